"""``causal_attention``, and its two halves for layers with a gradient of their own; the choice of implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import cudnn, xla


@jax.named_scope("attend")
def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSNH: Float[Array, "B S J H"],
    v_BSNW: Float[Array, "B S J W"],
    *,
    scale: float,
    q_offset: int | Int[Array, ""] | Int[Array, " B"] = 0,
    implementation: dispatch.AttentionImplementation = "auto",
) -> Float[Array, "B T N W"]:
    """Softmax attention in which query t sees the keys ``s <= t + q_offset``.

    Args:
        q_BTNH: queries.
        k_BSNH: keys; their J heads may be fewer than the N query heads, each serving N / J of them in a row.
        v_BSNW: values, whose head dim W may differ from H.
        scale: factor of the scores before the softmax.
        q_offset: position of the first query among the keys, one for all or one a sequence; at least 0.
        implementation: ``"xla"``, ``"cudnn"`` (Hopper, bfloat16 or float16) or ``"auto"``.

    Returns:
        ``[B, T, N, W]`` in the dtype of ``q_BTNH``; the softmax is computed in float32.

    Raises:
        ValueError: N is not a multiple of the key heads, or the implementation asked for cannot run.
    """
    heads, kv_heads = q_BTNH.shape[2], k_BSNH.shape[2]
    if heads % kv_heads:
        raise ValueError(f"causal_attention: {heads} query heads are not a multiple of {kv_heads} key heads")
    obstacles = {"cudnn": cudnn.obstacle(q_BTNH, k_BSNH, v_BSNW, q_offset)}
    if dispatch.choose("causal_attention", implementation, obstacles) == "cudnn":
        return cudnn.causal_attention(q_BTNH, k_BSNH, v_BSNW, scale=scale)
    return xla.causal_attention(q_BTNH, k_BSNH, v_BSNW, scale=scale, q_offset=jnp.asarray(q_offset))


@jax.named_scope("attend")
def attention_forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTNH: Float[Array, "B T J H"],
    v_BTNW: Float[Array, "B T J W"],
    *,
    scale: float,
    implementation: dispatch.AttentionImplementation = "auto",
) -> tuple[Float[Array, "B T N W"], Float[Array, "B N T"] | None]:
    """:func:`causal_attention` within one sequence, and what :func:`attention_backward` reads beside the output."""
    obstacles = {"cudnn": cudnn.obstacle(q_BTNH, k_BTNH, v_BTNW, 0)}
    if dispatch.choose("attention_forward", implementation, obstacles) == "cudnn":
        return cudnn.forward(q_BTNH, k_BTNH, v_BTNW, scale=scale)
    return causal_attention(q_BTNH, k_BTNH, v_BTNW, scale=scale, implementation="xla"), None


@jax.named_scope("attend")
def attention_backward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTNH: Float[Array, "B T J H"],
    v_BTNW: Float[Array, "B T J W"],
    o_BTNW: Float[Array, "B T N W"],
    sums_BNT: Float[Array, "B N T"] | None,
    do_BTNW: Float[Array, "B T N W"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T J H"], Float[Array, "B T J W"]]:
    """Gradients of queries, keys and values from the output that the forward stored, maybe with fewer bits.

    Args:
        q_BTNH: queries.
        k_BTNH: keys.
        v_BTNW: values.
        o_BTNW: the output of :func:`attention_forward`. Its product with ``do_BTNW`` is all that is read of it.
        sums_BNT: its second result, which also says which implementation ran.
        do_BTNW: gradient of the output.
        scale: as in the forward.
    """
    if sums_BNT is None:
        return xla.causal_backward(q_BTNH, k_BTNH, v_BTNW, o_BTNW, do_BTNW, scale=scale)
    return cudnn.backward(q_BTNH, k_BTNH, v_BTNW, o_BTNW, sums_BNT, do_BTNW, scale=scale)
