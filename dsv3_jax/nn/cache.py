"""What attention keeps of the tokens behind it, in pages, and how it is written and read."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.paged_attention import gather_pages, quantize_latents


class Pages(NamedTuple):
    """Memory for the caches of all layers, P pages of S tokens for each; page 0 takes what belongs to nobody.

    With MLA ``first`` is the normalized latent [L, P, S, C] and ``second`` the rotated shared key [L, P, S, R]
    (spec 4.3: as the official absorbed path stores them). With MHA they are keys [L, P, S, N', H] and values.
    """

    first: Float[Array, "L P S ..."]
    second: Float[Array, "L P S ..."]
    scale: Float32[Array, "L P S CB"] | None
    """Of latents in FP8, one for 128 numbers."""


class LayerCache(NamedTuple):
    """What one layer keeps of the tokens behind it: position s of sequence b is slot ``s % S`` of page
    ``table[b, s // S]`` of that layer."""

    pages: Pages
    table: Int[Array, "B X"]
    layer: Int[Array, ""] | int

    def flat(self, array: Array) -> Array:
        """``array`` of the pages, [L, P, S, ...], as [L * P, S, ...]: nothing moves."""
        return array.reshape(-1, *array.shape[2:])

    def flat_table(self) -> Int[Array, "B X"]:
        """Where this layer's pages are in what :meth:`flat` makes."""
        return self.table + self.layer * self.pages.first.shape[1]


def write_cache(
    cache: LayerCache, first: Float[Array, "B T ..."], second: Float[Array, "B T ..."], positions: Int[Array, "B T"]
) -> LayerCache:
    """The cache with T new tokens of every sequence at their positions; what is past the table goes to page 0."""
    pages, size = cache.pages, cache.pages.first.shape[2]
    row = jnp.arange(positions.shape[0])[:, None]
    page = cache.table.at[row, positions // size].get(mode="fill", fill_value=0)
    place = (cache.layer, page, positions % size)
    scale = pages.scale
    if scale is not None:
        first, scales = quantize_latents(first)
        scale = scale.at[place].set(scales)
    first = pages.first.at[place].set(first.astype(pages.first.dtype))
    second = pages.second.at[place].set(second.astype(pages.second.dtype))
    return cache._replace(pages=Pages(first, second, scale))


def read_cache(
    cache: LayerCache, positions: Int[Array, "B T"], dtype: jnp.dtype
) -> tuple[Float[Array, "B S ..."], Float[Array, "B S ..."]]:
    """Both arrays of every sequence in the order of positions, zero behind the last query."""
    length_B, table = positions[:, -1] + 1, cache.flat_table()
    scale = None if cache.pages.scale is None else cache.flat(cache.pages.scale)
    first = gather_pages(cache.flat(cache.pages.first), table, length_B, scale, dtype)
    return first, gather_pages(cache.flat(cache.pages.second), table, length_B, dtype=dtype)
