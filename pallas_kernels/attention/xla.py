"""The portable implementation: float32 softmax over explicit scores, chunked over queries when they are many."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import varying
from pallas_kernels.precision import matmul_precision

MAX_SCORES = 1 << 26
"""Most float32 scores held at once (256 MB): longer inputs go through in chunks of queries, rebuilt in the backward."""


def _by_key_head(x_BTNX: Array, kv_heads: int) -> Array:
    """``[B, T, J, N / J, X]``: the query heads that share a key head side by side."""
    batch, queries, heads, dim = x_BTNX.shape
    return x_BTNX.reshape(batch, queries, kv_heads, heads // kv_heads, dim)


def _product(formula: str, left: Array, right: Array) -> Array:
    precision = matmul_precision(left.dtype)
    return jnp.einsum(formula, left, right, preferred_element_type=jnp.float32, precision=precision)


def _weights(q_BTJRH: Array, k_BSNH: Array, first_B: Array, scale: float) -> Array:
    """Softmax ``[B, J, R, T, S]`` in float32 of a chunk of queries, of which the first sees keys ``s <= first_B``."""
    scores = scale * _product("btjrh,bsjh->bjrts", q_BTJRH, k_BSNH)
    last_seen_BT = first_B[:, None] + jnp.arange(q_BTJRH.shape[1])
    seen_BTS = jnp.arange(k_BSNH.shape[1]) <= last_seen_BT[:, :, None]
    return jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores, -jnp.inf), axis=-1)


def _attend(q_BTNH: Array, k_BSNH: Array, v_BSNW: Array, first_B: Array, scale: float) -> Array:
    """One chunk of queries, of which the first sees the keys ``s <= first_B``."""
    weights = _weights(_by_key_head(q_BTNH, v_BSNW.shape[2]), k_BSNH, first_B, scale).astype(v_BSNW.dtype)
    out = _product("bjrts,bsjw->btjrw", weights, v_BSNW)
    return out.reshape(*q_BTNH.shape[:3], v_BSNW.shape[3]).astype(q_BTNH.dtype)


def _attend_backward(
    q_BTNH: Array, k_BSNH: Array, v_BSNW: Array, o_BTNW: Array, do_BTNW: Array, first_B: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of a chunk of queries, and what it adds to those of keys and values, float32."""
    q, o, do = (_by_key_head(x, v_BSNW.shape[2]) for x in (q_BTNH, o_BTNW, do_BTNW))
    weights = _weights(q, k_BSNH, first_B, scale)
    dv_BSNW = _product("bjrts,btjrw->bsjw", weights.astype(do.dtype), do)
    along = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1).transpose(0, 2, 3, 1)
    dscores = weights * (_product("btjrw,bsjw->bjrts", do, v_BSNW) - along[..., None])
    dscores = (scale * dscores).astype(q.dtype)
    dq = _product("bjrts,bsjh->btjrh", dscores, k_BSNH).reshape(q_BTNH.shape)
    return dq, _product("bjrts,btjrh->bsjh", dscores, q), dv_BSNW


def causal_attention(
    q_BTNH: Array, k_BSNH: Array, v_BSNW: Array, *, scale: float, q_offset: Array, max_scores: int = MAX_SCORES
) -> Array:
    """Attention with at most ``max_scores`` float32 scores alive (but at least those of one query of every head)."""
    batch, queries, heads, _ = q_BTNH.shape
    offset_B = jnp.broadcast_to(q_offset, (batch,))
    num_chunks, chunk = _chunks(q_BTNH, k_BSNH, max_scores)
    if num_chunks == 1:
        return _attend(q_BTNH, k_BSNH, v_BSNW, offset_B, scale)
    q_AB = _split(q_BTNH, num_chunks, chunk)

    @jax.checkpoint
    def one_chunk(index: Array, q_chunk: Array) -> Array:
        return _attend(q_chunk, k_BSNH, v_BSNW, offset_B + index * chunk, scale)

    out_AB = lax.map(lambda item: one_chunk(*item), (jnp.arange(num_chunks), q_AB))
    return out_AB.swapaxes(0, 1).reshape(batch, num_chunks * chunk, heads, -1)[:, :queries]


def causal_backward(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNW: Array,
    o_BTNW: Array,
    do_BTNW: Array,
    *,
    scale: float,
    max_scores: int = MAX_SCORES,
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values from the output as it was stored; the weights are computed again."""
    num_chunks, chunk = _chunks(q_BTNH, k_BSNH, max_scores)
    q_AB, o_AB, do_AB = (_split(x, num_chunks, chunk) for x in (q_BTNH, o_BTNW, do_BTNW))

    def one_chunk(sums: tuple[Array, Array], item: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        index, q, o, do = item
        first_B = jnp.broadcast_to(index * chunk, (q.shape[0],))
        dq, dk, dv = _attend_backward(q, k_BSNH, v_BSNW, o, do, first_B, scale)
        return (sums[0] + dk, sums[1] + dv), dq

    def zeros(x: Array) -> Array:
        return varying.like(jnp.zeros(x.shape, jnp.float32), q_BTNH, k_BSNH, v_BSNW)

    start = zeros(k_BSNH), zeros(v_BSNW)
    (dk, dv), dq_AB = lax.scan(one_chunk, start, (jnp.arange(num_chunks), q_AB, o_AB, do_AB))
    batch, queries, heads, dim = q_BTNH.shape
    dq = dq_AB.swapaxes(0, 1).reshape(batch, -1, heads, dim)[:, :queries]
    return dq.astype(q_BTNH.dtype), dk.astype(k_BSNH.dtype), dv.astype(v_BSNW.dtype)


def _chunks(q_BTNH: Array, k_BSNH: Array, max_scores: int) -> tuple[int, int]:
    """How many chunks of queries, and how many queries in one."""
    batch, queries, heads, _ = q_BTNH.shape
    num_chunks = -(-queries // max(1, min(queries, max_scores // (batch * heads * k_BSNH.shape[1]))))
    return num_chunks, -(-queries // num_chunks)


def _split(x_BTNX: Array, num_chunks: int, chunk: int) -> Array:
    """``[chunks, B, queries of a chunk, N, X]``, zeros after the last query."""
    batch, queries, heads, dim = x_BTNX.shape
    padded = jnp.pad(x_BTNX, ((0, 0), (0, num_chunks * chunk - queries), (0, 0), (0, 0)))
    return padded.reshape(batch, num_chunks, chunk, heads, dim).swapaxes(0, 1)
