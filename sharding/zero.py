"""ZeRO-1 inside ``shard_map``: each device keeps a share of what the optimizer needs (design section 5).

Weights are gathered whole before the step's micro-batches, gradients are summed and scattered after them, and only the
share is updated. A spec says in which dims, over which axes, an array's share lies: a device's array is
the part that the spec gives it.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sharding.mesh import AXES


def _splits(spec: PartitionSpec) -> Iterator[tuple[int, tuple[str, ...]]]:
    for dim, part in enumerate(spec):
        if part is not None:
            yield dim, (part,) if isinstance(part, str) else tuple(part)


def _further(share: PartitionSpec, whole: PartitionSpec) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Dims and axes that ``share`` splits and ``whole`` does not."""
    before = dict(_splits(whole))
    return ((dim, axes) for dim, axes in _splits(share) if dim not in before)


def gather(x: Float[Array, "..."], share: PartitionSpec, whole: PartitionSpec, dtype: DTypeLike) -> Float[Array, "..."]:
    """A weight as the model needs it, from the shares of all devices; it travels as ``dtype`` and keeps its own type.

    Without anything to gather the weight is returned as it is, unrounded.
    """
    for dim, axes in _further(share, whole):
        x = lax.all_gather(x.astype(dtype), axes, axis=dim, tiled=True).astype(x.dtype)
    return x


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
