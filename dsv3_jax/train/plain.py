"""The plain form of a state: every layer once and in order, whatever the mesh; what is made, saved and sampled from.

In a pipeline the leading dim of what stages own is slots, some of them empty, split over the ranks. The plain form has
layers there, whole on every rank, and the ranks share out another dim: one exchange leads from one to the other, and no
device holds more than its share where a dim can be shared out so.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dsv3_jax.train.layout import Layout


def plain_shardings(layout: Layout, plain: Any) -> Any:
    """Where the plain form of a state, or of fields of it by name, lies."""
    _, tree, specs, _ = _places(layout, plain)
    return jax.tree.unflatten(tree, [NamedSharding(layout.mesh, spec) for spec in specs])


def to_stages(layout: Layout, plain: Any) -> Any:
    """A state's arrays as the step takes them, from their plain form laid out as :func:`plain_shardings` says."""
    leaves, tree, specs, dims = _places(layout, plain)
    if layout.partition is None:
        return plain
    found = jax.tree.leaves(layout.specs(layout.in_stages(plain)))
    layers = jnp.asarray(layout.partition.kept)

    def one(x: Array, dim: int) -> Array:
        if dim < 0:
            return x
        valid = (layers >= 0).reshape(-1, *[1] * (x.ndim - 1))
        slots = jnp.where(valid, x[jnp.maximum(layers, 0)], jnp.zeros((), x.dtype))
        if dim:
            return lax.all_to_all(slots, "pipe", 0, dim, tiled=True)
        mine = slots.shape[0] // lax.axis_size("pipe")
        return lax.dynamic_slice_in_dim(slots, lax.axis_index("pipe") * mine, mine)

    return jax.tree.unflatten(tree, _run(layout, one, leaves, dims, specs, found))


def to_plain(layout: Layout, state: Any) -> Any:
    """The plain form of a state's arrays, given as a tree of fields by name."""
    if layout.partition is None:
        return state
    kept = layout.partition.kept
    slots = jnp.asarray(np.argsort(kept, kind="stable")[np.count_nonzero(kept < 0) :])
    shapes = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jax.ShapeDtypeStruct((slots.size, *leaf.shape[1:]), leaf.dtype)
            if layout.is_staged(_name(path), leaf)
            else leaf
        ),
        state,
    )
    _, tree, specs, dims = _places(layout, shapes)

    def one(x: Array, dim: int) -> Array:
        if dim < 0:
            return x
        every = lax.all_to_all(x, "pipe", dim, 0, tiled=True) if dim else lax.all_gather(x, "pipe", axis=0, tiled=True)
        return every[slots]

    found = jax.tree.leaves(layout.specs(state))
    return jax.tree.unflatten(tree, _run(layout, one, jax.tree.leaves(state), dims, found, specs))


def _run(layout: Layout, one: Any, leaves: list[Any], dims: list[int], given: list[Any], found: list[Any]) -> list[Any]:
    def every(leaves: list[Array]) -> list[Array]:
        return [one(leaf, dim) for leaf, dim in zip(leaves, dims, strict=True)]

    mapped = jax.shard_map(every, mesh=layout.mesh, in_specs=(given,), out_specs=found, check_vma=False)
    return jax.jit(mapped)(leaves)


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
