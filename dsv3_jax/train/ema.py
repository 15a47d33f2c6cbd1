"""Moving average of parameters (V3 section 3.2.3; the decay is UNCONFIRMED)."""

from typing import Any

import jax
import jax.numpy as jnp


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """``decay * ema + (1 - decay) * params``, leaf by leaf, in float32.

    Args:
        ema: tree of float32 arrays, the average so far (a copy of the parameters before the first step).
        params: tree of the same structure, the parameters after the step.
        decay: share of the average that is kept, in [0, 1).

    Returns:
        The new average, float32.
    """

    def blend(average: jax.Array, value: jax.Array) -> jax.Array:
        average = average.astype(jnp.float32)
        return average + (1.0 - decay) * (value.astype(jnp.float32) - average)

    return jax.tree.map(blend, ema, params)
