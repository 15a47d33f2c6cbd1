"""The definition of attention over pages in plain jax.numpy; it is also the portable implementation."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.precision import matmul_precision
from pallas_kernels.quantize import reference as quantize


def gather_pages(
    pages_PSX: Array,
    table_BX: Array,
    length_B: Array,
    scale_PSX: Array | None = None,
    dtype: jnp.dtype | None = None,
) -> Array:
    """The tokens of each sequence in order, ``[B, X * S, ...]``, zero from ``length_B`` on.

    What lies behind a sequence's last token is another's, or was: it must not come in even multiplied by zero, for it
    may be infinite. With ``scale_PSX`` each run of 128 numbers of the last dim is multiplied by its scale, in float32.
    """
    found = pages_PSX[table_BX]
    dtype = dtype or pages_PSX.dtype
    if scale_PSX is not None:
        spread = jnp.repeat(scale_PSX[table_BX], quantize.TILE, axis=-1)[..., : found.shape[-1]]
        found = found.astype(jnp.float32) * spread
    found = found.astype(dtype).reshape(table_BX.shape[0], -1, *found.shape[3:])
    inside = jnp.arange(found.shape[1]) < length_B[:, None]
    return jnp.where(inside.reshape(*inside.shape, *(1,) * (found.ndim - 2)), found, 0)


def quantize_latents(latent_BTC: Array) -> tuple[Array, Array]:
    """Latents as e4m3fn and the float32 scale of each run of 128 of a token, ``[B, T, ceil(C / 128)]`` (spec 11.3)."""
    batch, tokens, dim = latent_BTC.shape
    q, scale = quantize.quantize_rows(latent_BTC.reshape(-1, dim))
    return q.reshape(latent_BTC.shape), scale.T.reshape(batch, tokens, -1)


def paged_attention(
    q_BTNC: Array,
    q_BTNR: Array,
    latent_PSC: Array,
    key_PSR: Array,
    table_BX: Array,
    first_B: Array,
    scale_PSX: Array | None,
    *,
    scale: float,
) -> Array:
    """As :func:`pallas_kernels.paged_attention.op.paged_attention`, over a copy of each sequence's pages."""
    dtype, queries = q_BTNC.dtype, q_BTNC.shape[1]
    einsum = functools.partial(jnp.einsum, precision=matmul_precision(dtype))
    length_B = first_B + queries
    latent_BSC = gather_pages(latent_PSC, table_BX, length_B, scale_PSX, dtype)
    key_BSR = gather_pages(key_PSR, table_BX, length_B, dtype=dtype)
    scores_BNTS = einsum("btnc,bsc->bnts", q_BTNC, latent_BSC, preferred_element_type=jnp.float32)
    scores_BNTS += einsum("btnr,bsr->bnts", q_BTNR, key_BSR, preferred_element_type=jnp.float32)
    last_BT = first_B[:, None] + jnp.arange(queries)
    seen_BTS = jnp.arange(latent_BSC.shape[1]) <= last_BT[..., None]
    p_BNTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores_BNTS * scale, -jnp.inf), axis=-1).astype(dtype)
    return einsum("bnts,bsc->btnc", p_BNTS, latent_BSC)
