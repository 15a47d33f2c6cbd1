"""The portable implementation: float32 softmax over explicit scores, chunked over queries when they are many."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.precision import matmul_precision

MAX_SCORES = 1 << 26
"""Most float32 scores held at once (256 MB): longer inputs go through in chunks of queries, rebuilt in the backward."""


def _attend(q_BTNH: Array, k_BSNH: Array, v_BSNW: Array, first_B: Array, scale: float) -> Array:
    """One chunk of queries, of which the first sees the keys ``s <= first_B``."""
    precision = matmul_precision(q_BTNH.dtype)
    batch, queries, heads, dim = q_BTNH.shape
    kv_heads, value_dim = v_BSNW.shape[2:]
    q_BTJRH = q_BTNH.reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    scores = scale * jnp.einsum(
        "btjrh,bsjh->bjrts", q_BTJRH, k_BSNH, preferred_element_type=jnp.float32, precision=precision
    )
    last_seen_BT = first_B[:, None] + jnp.arange(queries)
    seen_BTS = jnp.arange(k_BSNH.shape[1]) <= last_seen_BT[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores, -jnp.inf), axis=-1).astype(v_BSNW.dtype)
    out = jnp.einsum("bjrts,bsjw->btjrw", weights, v_BSNW, preferred_element_type=jnp.float32, precision=precision)
    return out.reshape(batch, queries, heads, value_dim).astype(q_BTNH.dtype)


def causal_attention(
    q_BTNH: Array, k_BSNH: Array, v_BSNW: Array, *, scale: float, q_offset: Array, max_scores: int = MAX_SCORES
) -> Array:
    """Attention with at most ``max_scores`` float32 scores alive (but at least those of one query of every head)."""
    batch, queries, heads, dim = q_BTNH.shape
    offset_B = jnp.broadcast_to(q_offset, (batch,))
    chunk = max(1, min(queries, max_scores // (batch * heads * k_BSNH.shape[1])))
    if chunk == queries:
        return _attend(q_BTNH, k_BSNH, v_BSNW, offset_B, scale)
    num_chunks = -(-queries // chunk)
    chunk = -(-queries // num_chunks)
    padded = jnp.pad(q_BTNH, ((0, 0), (0, num_chunks * chunk - queries), (0, 0), (0, 0)))
    q_AB = padded.reshape(batch, num_chunks, chunk, heads, dim).swapaxes(0, 1)

    @jax.checkpoint
    def one_chunk(index: Array, q_chunk: Array) -> Array:
        return _attend(q_chunk, k_BSNH, v_BSNW, offset_B + index * chunk, scale)

    out_AB = lax.map(lambda item: one_chunk(*item), (jnp.arange(num_chunks), q_AB))
    return out_AB.swapaxes(0, 1).reshape(batch, num_chunks * chunk, heads, -1)[:, :queries]
