"""Makes fresh arrays agree with their operands on the mesh axes they vary over, inside ``jax.shard_map``."""

import jax
from jax import Array, lax


def axes_of(*operands: Array) -> frozenset[str]:
    """The manual mesh axes that any operand varies over; empty outside ``jax.shard_map``."""
    return frozenset().union(*(jax.typeof(operand).mat.varying for operand in operands))


def like(fresh: Array, *operands: Array) -> Array:
    """``fresh``, a loop's initial carry or a kernel's result, marked as varying over the operands' mesh axes."""
    missing = axes_of(*operands) - axes_of(fresh)
    return lax.pcast(fresh, tuple(sorted(missing)), to="varying") if missing else fresh
