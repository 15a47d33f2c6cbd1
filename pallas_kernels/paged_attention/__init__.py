"""Attention of a few queries a sequence over latents kept in pages, which all heads share."""

from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.paged_attention.reference import gather_pages, quantize_latents

__all__ = ["gather_pages", "paged_attention", "quantize_latents"]
