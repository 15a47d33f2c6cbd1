"""Weights in and out: the Hugging Face layout, PyTorch files, and ours."""
