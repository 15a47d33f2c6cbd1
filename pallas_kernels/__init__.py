"""Kernels of dsv3_jax: one folder an operation. Imports jax and numpy only."""
