"""The plain form of a state: every layer once and in order, whatever the mesh; what is made, saved and sampled from.

In a pipeline the leading dim of what stages own is slots, some of them empty, split over the ranks. The plain form has
layers there, whole on every rank, and the ranks share out another dim: one exchange leads from one to the other, and no
device holds more than its share where a dim can be shared out so.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dsv3_jax.train.layout import Layout
from sharding.pipeline.partition import Partition


def plain_shardings(layout: Layout, plain: Any) -> Any:
    """Where the plain form of a state, or of fields of it by name, lies."""
    _, tree, specs, _ = _places(layout, plain)
    return jax.tree.unflatten(tree, [NamedSharding(layout.mesh, spec) for spec in specs])


def to_stages(layout: Layout, plain: Any) -> Any:
    """A state's arrays as the step takes them, from their plain form laid out as :func:`plain_shardings` says."""
    if layout.partition is None:
        return plain
    leaves, tree, specs, dims = _places(layout, plain)
    found = jax.tree.leaves(layout.specs(layout.in_stages(plain)))
    return jax.tree.unflatten(tree, _convert(layout, _into_slots, tuple(dims), tuple(specs), tuple(found), leaves))


def to_plain(layout: Layout, state: Any) -> Any:
    """The plain form of a state's arrays, given as a tree of fields by name."""
    if layout.partition is None:
        return state
    layers = int(np.count_nonzero(layout.partition.kept >= 0))

    def plain_shape(path: Any, leaf: Any) -> Any:
        staged = layout.is_staged(_name(path), leaf)
        return jax.ShapeDtypeStruct((layers, *leaf.shape[1:]), leaf.dtype) if staged else leaf

    _, tree, specs, dims = _places(layout, jax.tree_util.tree_map_with_path(plain_shape, state))
    given, leaves = jax.tree.leaves(layout.specs(state)), jax.tree.leaves(state)
    return jax.tree.unflatten(tree, _convert(layout, _out_of_slots, tuple(dims), tuple(given), tuple(specs), leaves))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _convert(layout: Layout, one: Any, dims: Any, given: Any, found: Any, leaves: list[Array]) -> list[Array]:
    """``one(partition, leaf, dim)`` on every device, of every array that has stages."""

    def every(leaves: list[Array]) -> list[Array]:
        return [leaf if dim < 0 else one(layout.partition, leaf, dim) for leaf, dim in zip(leaves, dims, strict=True)]

    return jax.shard_map(every, mesh=layout.mesh, in_specs=(list(given),), out_specs=list(found), check_vma=False)(
        leaves
    )


def _into_slots(partition: Partition, x: Array, dim: int) -> Array:
    layers = jnp.asarray(partition.kept)
    valid = (layers >= 0).reshape(-1, *[1] * (x.ndim - 1))
    slots = jnp.where(valid, x[jnp.maximum(layers, 0)], jnp.zeros((), x.dtype))
    if dim:
        return lax.all_to_all(slots, "pipe", 0, dim, tiled=True)
    mine = slots.shape[0] // lax.axis_size("pipe")
    return lax.dynamic_slice_in_dim(slots, lax.axis_index("pipe") * mine, mine)


def _out_of_slots(partition: Partition, x: Array, dim: int) -> Array:
    slots = np.argsort(partition.kept, kind="stable")[np.count_nonzero(partition.kept < 0) :]
    every = lax.all_to_all(x, "pipe", dim, 0, tiled=True) if dim else lax.all_gather(x, "pipe", axis=0, tiled=True)
    return every[jnp.asarray(slots)]


def _places(layout: Layout, plain: Any) -> tuple[list[Any], Any, list[PartitionSpec], list[int]]:
    """Leaves of a plain form, their tree, their specs, and the dim of each that the ranks share out.

    The dim is 0 where none can be, and -1 for what has no stages.
    """
    paths, tree = jax.tree.flatten_with_path(plain)
    staged = layout.in_stages(plain)
    specs, dims, sizes = [], [], dict(layout.mesh.shape)
    for (path, leaf), shape, share in zip(
        paths, jax.tree.leaves(staged), jax.tree.leaves(layout.specs(staged)), strict=True
    ):
        if not layout.is_staged(_name(path), leaf):
            specs.append(share)
            dims.append(-1)
            continue
        parts = [_axes(part) for part in (*share, *[None] * (len(shape.shape) - len(share)))]
        local = [size // math.prod(sizes[axis] for axis in axes) for size, axes in zip(shape.shape, parts, strict=True)]
        dim = next((i for i in range(1, len(local)) if local[i] % sizes["pipe"] == 0), 0)
        parts[0] = ()
        if dim:
            parts[dim] = (*parts[dim], "pipe")
        specs.append(PartitionSpec(*[part or None for part in parts]))
        dims.append(dim)
    return [leaf for _, leaf in paths], tree, specs, dims


def _axes(part: Any) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
