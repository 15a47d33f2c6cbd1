"""SwiGLU with quantized output and FP8-cached inputs."""

from pallas_kernels.swiglu_quantize.op import (
    swiglu_backward,
    swiglu_backward_quantize,
    swiglu_quantize,
    swiglu_with_gradient,
)

__all__ = ["swiglu_backward", "swiglu_backward_quantize", "swiglu_quantize", "swiglu_with_gradient"]
