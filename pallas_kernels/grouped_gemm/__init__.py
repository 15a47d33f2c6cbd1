"""Grouped matrix product over blocks of rows, each block with one group's weight."""

from pallas_kernels.grouped_gemm.op import grouped_gemm, grouped_gemm_backward

__all__ = ["grouped_gemm", "grouped_gemm_backward"]
