"""Causal attention whose value heads may be narrower than its query/key heads."""

from pallas_kernels.attention.op import attention_backward, attention_forward, causal_attention

__all__ = ["attention_backward", "attention_forward", "causal_attention"]
