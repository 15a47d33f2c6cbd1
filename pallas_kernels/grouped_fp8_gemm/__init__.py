"""Block-scaled FP8 products in groups: contiguous rows, masked rows for decoding, and the weight gradient."""

from pallas_kernels.grouped_fp8_gemm.op import grouped_fp8_gemm, grouped_fp8_wgrad, masked_fp8_gemm

__all__ = ["grouped_fp8_gemm", "grouped_fp8_wgrad", "masked_fp8_gemm"]
