"""RMSNorm with quantized output."""

from pallas_kernels.norm_quantize.op import norm_backward, norm_quantize

__all__ = ["norm_backward", "norm_quantize"]
