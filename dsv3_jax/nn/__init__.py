"""Flax NNX modules of the DeepSeek family, one idea a file."""
