"""What MLA and MHA share: attention with the projection after it."""

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.nn import fp8_attention
from dsv3_jax.nn.fp8 import FP8Weight
from dsv3_jax.nn.linear import Linear
from pallas_kernels.attention import causal_attention


def attend_and_project(
    q_BTNH: Float[Array, "B T N H"],
    k_BTNH: Float[Array, "B T J H"],
    v_BTNW: Float[Array, "B T J W"],
    out: Linear,
    *,
    scale: float,
) -> Float[Array, "B T D"]:
    """``out(causal_attention(q, k, v))``."""
    kernel = out.kernel.get_value()
    if isinstance(kernel, FP8Weight):
        return fp8_attention.attend_and_project(q_BTNH, k_BTNH, v_BTNW, kernel, scale=scale)
    o_BTNW = causal_attention(q_BTNH, k_BTNH, v_BTNW, scale=scale)
    return out(checkpoint_name(o_BTNW.reshape(*q_BTNH.shape[:2], -1), "attention"))
