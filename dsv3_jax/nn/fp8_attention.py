"""Attention and the FP8 projection after it as one function that keeps the attention's output once, in E5M6 (spec 12).

Both halves of the backward pass read that copy: attention itself, and the projection's weight gradient, whose 128 x 1
tiles are made of it.
"""

import functools
from typing import NamedTuple

import jax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from dsv3_jax.nn.fp8 import Codes, FP8Weight, gemm, gradient, pad_rows, trim, wgrad
from pallas_kernels.attention import attention_backward, attention_forward
from pallas_kernels.quantize import (
    PackedE5M6,
    quantize_and_pack,
    quantize_both,
    unpack_and_quantize_columns,
)
from pallas_kernels.quantize.reference import pad_to_tiles


def attend_and_project(
    q_BTNH: Float[Array, "B T N H"],
    k_BTNH: Float[Array, "B T J H"],
    v_BTNW: Float[Array, "B T J W"],
    weight: FP8Weight,
    *,
    scale: float,
) -> Float[Array, "B T D"]:
    """``causal_attention(q, k, v) @ weight``, the product in FP8.

    The product reads the output in E4M3 tiles; kept are queries, keys, values, the softmax's sums and the output in
    E5M6, all with power-of-two scales (spec 11.3), so that the way from E5M6 to 128 x 1 tiles rounds once.
    """
    return _attend(q_BTNH, k_BTNH, v_BTNW, weight, scale)


class _Kept(NamedTuple):
    q: Array
    k: Array
    v: Array
    out: PackedE5M6
    sums: Array | None
    codes: Codes


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, weight: FP8Weight, scale: float) -> Array:
    return _forward(q, k, v, weight, scale)[0]


def _forward(q: Array, k: Array, v: Array, weight: FP8Weight, scale: float) -> tuple[Array, _Kept]:
    o_BTNW, sums = attention_forward(q, k, v, scale=scale)
    o_MX = o_BTNW.reshape(-1, o_BTNW.shape[2] * o_BTNW.shape[3])
    tiles, packed = quantize_and_pack(pad_rows(o_MX))
    y_MD = gemm(tiles, weight.forward, None, q.dtype)
    out, sums = jax.tree.map(lambda leaf: checkpoint_name(leaf, "attention"), (packed, sums))
    return trim(y_MD, q.shape[:2], weight.shape[-1]), _Kept(q, k, v, out, sums, weight.backward)


def _backward(scale: float, kept: _Kept, dy: Array) -> tuple[Array, Array, Array, FP8Weight]:
    q, k, v, stored, sums, codes = kept
    # Nothing else would keep XLA from unpacking all layers' outputs at once, as soon as the forward pass is done.
    out, dy = lax.optimization_barrier((stored, dy))
    dim_d = dy.shape[-1]
    dy_rows, dy_columns = quantize_both(pad_to_tiles(dy.reshape(-1, dim_d), 2))
    o_MX, o_columns = unpack_and_quantize_columns(out, dy.dtype)
    dw_XD = wgrad(o_columns, dy_columns, None)
    shape = (*q.shape[:3], v.shape[3])
    do_BTNW = trim(gemm(dy_rows, codes, None, dy.dtype), dy.shape[:-1], o_MX.shape[1]).reshape(shape)
    o_BTNW = trim(o_MX, dy.shape[:-1], o_MX.shape[1]).reshape(shape)
    dq, dk, dv = attention_backward(q, k, v, o_BTNW, sums, do_BTNW, scale=scale)
    return dq, dk, dv, gradient(dw_XD[:, :dim_d])


_attend.defvjp(_forward, _backward)
