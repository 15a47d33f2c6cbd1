"""Makes fresh arrays agree with their operands on the mesh axes they vary over, inside ``jax.shard_map``."""

from typing import Any

import jax
from jax import Array, lax


def axes_of(*operands: Array) -> frozenset[str]:
    """The manual mesh axes that any operand varies over; empty outside ``jax.shard_map``."""
    return frozenset().union(*(jax.typeof(operand).mat.varying for operand in operands))


def like(fresh: Array, *operands: Array) -> Array:
    """``fresh`` marked as varying over every mesh axis that the operands vary over (a loop's initial carry)."""
    missing = axes_of(*operands) - axes_of(fresh)
    return lax.pcast(fresh, tuple(sorted(missing)), to="varying") if missing else fresh


def result_type(shape: tuple[int, ...], dtype: Any, *operands: Array) -> jax.ShapeDtypeStruct:
    """A kernel's result type, varying over every mesh axis that the operands vary over."""
    varies = jax.sharding.ManualAxisType(varying=axes_of(*operands))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varies)
