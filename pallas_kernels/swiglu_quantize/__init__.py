"""SwiGLU with quantized output and FP8-cached inputs."""

from pallas_kernels.swiglu_quantize.op import (
    swiglu_backward,
    swiglu_backward_quantize,
    swiglu_quantize,
    swiglu_with_gradient,
)
from pallas_kernels.swiglu_quantize.reference import SwigluGradients

__all__ = ["SwigluGradients", "swiglu_backward", "swiglu_backward_quantize", "swiglu_quantize", "swiglu_with_gradient"]
