"""Where every parameter lives: its dims by name, once, and the mesh axis that each name is split over.

The table names the trailing dims of a parameter by the last words of its path. What the table leaves whole, ZeRO-1
splits: see :func:`zero_spec`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jax.sharding import PartitionSpec

from sharding.mesh import AXES

MESH_AXIS_OF = {"expert": "expert"}
"""Mesh axis of a named dim; names that are not here stay whole."""

PARAMETERS: dict[str, tuple[str, ...]] = {
    "embedding/table": ("vocabulary", "model"),
    "head/kernel": ("model", "vocabulary"),
    "scale": ("norm",),
    "attention/q_down/kernel": ("model", "query_latent"),
    "attention/q_up/kernel": ("query_latent", "heads"),
    "attention/kv_down/kernel": ("model", "latent"),
    "attention/kv_up/kernel": ("latent", "heads"),
    "attention/query/kernel": ("model", "heads"),
    "attention/key/kernel": ("model", "heads"),
    "attention/value/kernel": ("model", "heads"),
    "attention/out/kernel": ("heads", "model"),
    "ffn/gate_up/kernel": ("model", "ffn"),
    "ffn/down/kernel": ("ffn", "model"),
    "shared/gate_up/kernel": ("model", "ffn"),
    "shared/down/kernel": ("ffn", "model"),
    "router/kernel": ("model", "router"),
    "router/bias": ("router",),
    "moe/gate_up": ("expert", "model", "ffn"),
    "moe/down": ("expert", "ffn", "model"),
    "project/kernel": ("model", "model"),
}
"""Dims of a parameter by the end of its path; layers stacked before them are named ``layer``."""


def dims_of(path: str, ndim: int) -> tuple[str, ...]:
    """Names of a parameter's dims.

    Args:
        path: such as ``moe/moe/gate_up``, with or without what comes before the model's own names.
        ndim: how many dims it has.

    Raises:
        ValueError: the table does not know it, or knows it with more dims.
    """
    ends = [end for end in PARAMETERS if path == end or path.endswith(f"/{end}")]
    if not ends:
        raise ValueError(f"no rule for parameter {path}: add a line to sharding.rules.PARAMETERS")
    dims = PARAMETERS[max(ends, key=len)]
    if len(dims) > ndim:
        raise ValueError(f"parameter {path} has {ndim} dims where sharding.rules.PARAMETERS names {dims}")
    return ("layer",) * (ndim - len(dims)) + dims


def stacked_layers(path: str, ndim: int) -> int:
    """How many leading dims of a parameter are layers stacked."""
    return dims_of(path, ndim).count("layer")


def in_fp8(path: str) -> bool:
    """Whether the parameter at ``path``, such as ``moe/attention/out/kernel``, takes part in FP8 products.

    Linear layers of attention, dense networks and experts do; embedding, head, router, norms and MTP's projection do
    not (spec 11.2).
    """
    *_, owner, layer, name = ("", "", *path.split("/"))
    if name == "kernel":
        return owner in ("attention", "ffn", "shared")
    return layer == "moe" and name in ("gate_up", "down")


def travels_as(path: str, ndim: int, precision: str) -> Literal["fp32", "bf16", "fp8"]:
    """The type in which a weight is gathered: that of the products it enters under a ``train.precision``.

    Norms and routers compute in float32, whatever the precision of the products (spec 11.2).
    """
    if precision == "fp32" or dims_of(path, ndim)[-1] in ("norm", "router"):
        return "fp32"
    return "fp8" if precision == "fp8" and in_fp8(path) else "bf16"


def is_staged(path: str, ndim: int) -> bool:
    """Whether a parameter's leading dim is the layers of a pipeline's stages. Dense layers come before them and are on
    every rank."""
    return stacked_layers(path, ndim) > 0 and "dense" not in path.split("/")


def model_spec(path: str, shape: Sequence[int], mesh_sizes: Mapping[str, int]) -> PartitionSpec:
    """How the model's code sees a parameter: split as the table says, whole over every other axis.

    Raises:
        ValueError: no rule, one mesh axis for two dims, or a dim that its axis does not divide.
    """
    axes = [MESH_AXIS_OF.get(name) for name in dims_of(path, len(shape))]
    if is_staged(path, len(shape)):
        axes[0] = "pipe"
    used = [axis for axis in axes if axis is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"parameter {path}: two of its dims are split over one mesh axis ({', '.join(used)})")
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and size % mesh_sizes[axis]:
            raise ValueError(f"parameter {path}: mesh.{axis} = {mesh_sizes[axis]} must divide its {size} entries")
    return _trimmed([axis if axis is not None and mesh_sizes[axis] > 1 else None for axis in axes])


def zero_spec(
    shape: Sequence[int], spec: PartitionSpec, mesh_sizes: Mapping[str, int], layers: int = 0
) -> PartitionSpec:
    """How the optimizer sees a parameter: as the model does, and split further over the axes it is whole on.

    The first dim that all these axes together divide is split, else the first that the largest of them divides; a
    parameter with neither stays whole. The leading dims of stacked ``layers`` come last: a layer's part of a share is
    then one piece of memory, and can be gathered and scattered by itself.
    """
    parts: list[Any] = [*spec, *[None] * (len(shape) - len(spec))]
    taken = {axis for part in spec for axis in ((part,) if isinstance(part, str) else part or ())}
    free = tuple(axis for axis in AXES if axis not in taken and mesh_sizes[axis] > 1)
    largest = tuple(sorted(free, key=lambda axis: -mesh_sizes[axis])[:1])
    for axes in (free, largest):
        count = math.prod(mesh_sizes[axis] for axis in axes)
        for dim in (*range(layers, len(shape)), *range(layers)):
            if axes and parts[dim] is None and shape[dim] % count == 0:
                parts[dim] = axes if len(axes) > 1 else next(iter(axes))
                return _trimmed(parts)
    return spec


def _trimmed(parts: Sequence[Any]) -> PartitionSpec:
    """Without what it says of trailing whole dims: JAX takes specs that differ in that alone for different."""
    last = max((i for i, part in enumerate(parts) if part is not None), default=-1)
    return PartitionSpec(*parts[: last + 1])
