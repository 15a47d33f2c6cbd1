"""Causal attention whose value heads may be narrower than its query/key heads."""

from pallas_kernels.attention.op import causal_attention

__all__ = ["causal_attention"]
