"""Block-scaled FP8 matrix products on quantized operands: forward and input gradient, and the weight gradient."""

from pallas_kernels.fp8_gemm.op import fp8_gemm, fp8_wgrad

__all__ = ["fp8_gemm", "fp8_wgrad"]
