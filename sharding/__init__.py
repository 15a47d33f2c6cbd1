"""Meshes and layouts. Imports pallas_kernels and jax; knows nothing of models."""
