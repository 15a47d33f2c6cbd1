"""Matrix products of rows with one weight for each group: of blocks of sorted rows, or of the same few rows."""

from pallas_kernels.grouped_gemm.every_group import every_group_gemm
from pallas_kernels.grouped_gemm.op import grouped_gemm, grouped_gemm_backward

__all__ = ["every_group_gemm", "grouped_gemm", "grouped_gemm_backward"]
