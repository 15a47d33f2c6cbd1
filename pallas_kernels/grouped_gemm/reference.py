"""The definition: every group's product over all rows in float32, masked to its own. For tests only."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def grouped_gemm(
    x_MK: Float[Array, "M K"], w_GKN: Float[Array, "G K N"], group_of_block: Int[Array, " NB"], *, block: int
) -> Float[Array, "M N"]:
    """``y[m] = x[m] @ w[group_of_block[m // block]]`` in float32, whatever the inputs' dtypes."""
    group_M = jnp.repeat(group_of_block, block)
    y_MN = jnp.zeros((x_MK.shape[0], w_GKN.shape[2]), jnp.float32)
    for g in range(w_GKN.shape[0]):
        mine_MK = jnp.where((group_M == g)[:, None], x_MK.astype(jnp.float32), 0.0)
        y_MN += jnp.dot(mine_MK, w_GKN[g].astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return y_MN
