"""ZeRO-1 inside ``shard_map``: each device keeps a share of what the optimizer needs (design section 5).

Weights are gathered whole before the step's micro-batches, gradients are summed and scattered after them, and only the
share is updated. A spec says in which dims, over which axes, an array's share lies: a device's array is
the part that the spec gives it.

A weight of FP8 products is quantized from the float32 share, and its codes travel (:func:`quantize`,
:func:`gather_codes`).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Float32

from pallas_kernels.quantize import quantize_weight
from pallas_kernels.quantize.reference import TILE, encode, largest_magnitude, pad_to_tiles, scale_of
from sharding.mesh import AXES


def _splits(spec: PartitionSpec) -> Iterator[tuple[int, tuple[str, ...]]]:
    for dim, part in enumerate(spec):
        if part is not None:
            yield dim, (part,) if isinstance(part, str) else tuple(part)


def _further(share: PartitionSpec, whole: PartitionSpec) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Dims and axes that ``share`` splits and ``whole`` does not."""
    before = dict(_splits(whole))
    return ((dim, axes) for dim, axes in _splits(share) if dim not in before)


def whole_shape(shape: Sequence[int], share: PartitionSpec, whole: PartitionSpec) -> tuple[int, ...]:
    """Of what :func:`gather` makes of shares of ``shape``."""
    sizes = list(shape)
    for dim, axes in _further(share, whole):
        sizes[dim] *= lax.axis_size(axes)
    return tuple(sizes)


def gather(x: Float[Array, "..."], share: PartitionSpec, whole: PartitionSpec, dtype: DTypeLike) -> Float[Array, "..."]:
    """A weight as the model needs it, from the shares of all devices, in the type ``dtype`` that it travels in.

    Without anything to gather the weight is returned as it is, unrounded, in its own.
    """
    for dim, axes in _further(share, whole):
        x = lax.all_gather(x.astype(dtype), axes, axis=dim, tiled=True)
    return x


def wide(weights: Any) -> Any:
    """A tree of weights in float32, for gradients in it; where a product narrows them again, XLA does neither."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)


def quantize(
    x: Float[Array, "*lead K N"], share: PartitionSpec, whole: PartitionSpec
) -> tuple[Float8e4m3fn[Array, "*lead K N"], Float32[Array, "*lead2 KB NB"]]:
    """Codes of a share, and the scales of all the weight that the model needs, one for each 128 x 128 block of it.

    Both are those of the weight quantized on one device, bit for bit. Where shares cut blocks, devices tell each other
    the largest magnitudes of their parts of a block before they scale it; a whole block's scale is its owner's.

    Raises:
        ValueError: shares and wholes differ in another number of dims than one.
    """
    further = list(_further(share, whole))
    if len(further) != 1:
        raise ValueError(f"quantize: shares {share} of {whole} must be split in one more dim, not {len(further)}")
    ((dim, axes),) = further
    if dim < x.ndim - 2 or x.shape[dim] % TILE == 0:
        weight = quantize_weight(pad_to_tiles(x, 2))
        scale = lax.all_gather(weight.scale_KN, axes, axis=dim, tiled=True)
        return weight.q_KN[..., : x.shape[-2], : x.shape[-1]], scale
    if dim == x.ndim - 2:
        return _quantize_parts_of_blocks(x, axes)
    q, scale = _quantize_parts_of_blocks(x.mT, axes)
    return q.mT, scale.mT


def _quantize_parts_of_blocks(x: Array, axes: tuple[str, ...]) -> tuple[Array, Array]:
    """:func:`quantize` of as many rows of a weight as every device has, where blocks lie across devices.

    Pieces of as many rows as divide both a share and a block lie in one of either.
    """
    (*lead, rows, columns), dim = x.shape, x.ndim - 2
    size = math.gcd(rows, TILE)
    mine, of_a_block = rows // size, TILE // size
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -columns % TILE)])
    pieces = padded.reshape(*lead, mine, size, -1, TILE)
    found = lax.all_gather(largest_magnitude(pieces, (-3, -1)), axes, axis=dim, tiled=True)
    found = jnp.pad(found, [(0, 0)] * dim + [(0, -found.shape[dim] % of_a_block), (0, 0)])
    blocks = found.reshape(*lead, -1, of_a_block, found.shape[-1])
    scale = scale_of(largest_magnitude(blocks, -2))
    of_pieces = lax.dynamic_slice_in_dim(
        jnp.repeat(scale, of_a_block, axis=dim), lax.axis_index(axes) * mine, mine, axis=dim
    )
    q = encode(pieces, of_pieces[..., :, None, :, None]).reshape(padded.shape)
    return q[..., :columns], scale


def gather_codes(
    q: Float8e4m3fn[Array, "*lead K N"], share: PartitionSpec, whole: PartitionSpec
) -> tuple[Float8e4m3fn[Array, "*lead2 K2 N2"], Float8e4m3fn[Array, "*lead2 N2 K2"]]:
    """A weight's codes in both orientations from the shares of all devices; they travel in one, a byte a number.

    Zeros after the last row and column make its blocks whole.
    """
    bits = lax.bitcast_convert_type(q, jnp.uint8)
    for dim, axes in _further(share, whole):
        bits = lax.all_gather(bits, axes, axis=dim, tiled=True)
    q_KN = pad_to_tiles(lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), 2)
    return q_KN, q_KN.mT


def scatter(grad: Float[Array, "..."], share: PartitionSpec, whole: PartitionSpec) -> Float[Array, "..."]:
    """This device's share of a gradient's sum over all devices that computed a part of it.

    Those are all, but along the axes that the model's code splits the weight over: there every device has the whole
    gradient of its own part.
    """
    mine = {axis for _, axes in _splits(whole) for axis in axes}
    summed = set()
    for dim, axes in _further(share, whole):
        grad = lax.psum_scatter(grad, axes, scatter_dimension=dim, tiled=True)
        summed |= {*axes}
    rest = tuple(axis for axis in AXES if axis not in mine | summed)
    return lax.psum(grad, rest) if rest else grad


def global_norm(tree: Any, specs: Any) -> Float[Array, ""]:
    """L2 norm over all devices of arrays that each hold the share their spec says; float32.

    Each array's squares are summed over the axes it is split over and no others, so that what several devices hold is
    counted once.
    """
    by_axes: dict[tuple[str, ...], list[jax.Array]] = {}
    leaves = jax.tree.leaves(tree)
    for leaf, spec in zip(leaves, jax.tree.leaves(specs), strict=True):
        used = {axis for _, axes in _splits(spec) for axis in axes}
        axes = tuple(axis for axis in AXES if axis in used)
        by_axes.setdefault(axes, []).append(jnp.sum(jnp.square(leaf.astype(jnp.float32))))
    sums = [lax.psum(sum(squares), axes) if axes else sum(squares) for axes, squares in by_axes.items()]
    return jnp.sqrt(jnp.asarray(sum(sums), jnp.float32))
