"""The definition, and the portable implementation: a loop over 128-wide blocks of the contraction (spec 11.4).

``acc += (a_block . b_block) * a_scale * b_scale``, in float32. A product of two e4m3 values is exact in float32, so
only the order of additions is left to the machine.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import dispatch, varying
from pallas_kernels.precision import matmul_precision

BLOCK = 128
"""Elements that share a scale."""


def multipliable(q: Array) -> Array:
    """e4m3 values in a dtype that a product takes: float32 on CPUs; bfloat16, which holds them all, elsewhere."""
    return q.astype(jnp.float32 if dispatch.platform() == "cpu" else jnp.bfloat16)


def contraction_blocks(q: Array) -> Array:
    """``[..., R, K]`` as ``[K / 128, ..., R, 128]``, zero-padded to whole blocks: what a scan walks over."""
    pad = -q.shape[-1] % BLOCK
    wide = jnp.pad(multipliable(q), [(0, 0)] * (q.ndim - 1) + [(0, pad)])
    return jnp.moveaxis(wide.reshape(*q.shape[:-1], -1, BLOCK), -2, 0)


def spread_rows(scale: Array, rows: int) -> Array:
    """Scales of blocks of 128 rows, ``[..., R / 128]``, as one a row: ``[..., R]``."""
    return jnp.repeat(scale, BLOCK, axis=-1)[..., :rows]


def block_product(formula: str, a: Array, b: Array) -> Array:
    """One block's product, in float32."""
    return jnp.einsum(formula, a, b, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)


def fp8_gemm(
    q_MK: Float[Array, "M K"], sa_KM: Float[Array, "KB M"], w_NK: Float[Array, "N K"], sb_NK: Float[Array, "NB KB"]
) -> Float[Array, "M N"]:
    """``y = dequantized(q_MK) @ dequantized(w_NK).T`` in float32, each block of K scaled on its own."""
    return _scaled(q_MK, sa_KM, w_NK, spread_rows(sb_NK.T, w_NK.shape[0]))


def fp8_wgrad(
    x_KM: Float[Array, "K M"], sx_MK: Float[Array, "MB K"], dy_NM: Float[Array, "N M"], sdy_MN: Float[Array, "MB N"]
) -> Float[Array, "K N"]:
    """``dw = dequantized(x_KM) @ dequantized(dy_NM).T`` in float32, each block of tokens scaled on its own."""
    return _scaled(x_KM, sx_MK, dy_NM, sdy_MN)


def _scaled(a_RK: Array, a_scale_KR: Array, b_CK: Array, b_scale_KC: Array) -> Array:
    def add_block(acc: Array, block: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        a, b, a_scale, b_scale = block
        return acc + block_product("rk,ck->rc", a, b) * a_scale[:, None] * b_scale[None, :], None

    zeros = varying.like(jnp.zeros((a_RK.shape[0], b_CK.shape[0]), jnp.float32), a_RK, a_scale_KR, b_CK, b_scale_KC)
    blocks = (contraction_blocks(a_RK), contraction_blocks(b_CK), a_scale_KR, b_scale_KC)
    return lax.scan(add_block, zeros, blocks)[0]
