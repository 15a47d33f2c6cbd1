"""``every_group_gemm``: a few rows through the weight of every group, without a plan."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.grouped_gemm import every_group_sm90
from pallas_kernels.once import once
from pallas_kernels.precision import matmul_precision


@jax.named_scope("every_group_gemm")
def every_group_gemm(
    x: Float[Array, "*G T K"], w_GKN: Float[Array, "G K N"], *, implementation: dispatch.Implementation = "auto"
) -> Float[Array, "G T N"]:
    """``y[g] = x @ w[g]``, or ``x[g] @ w[g]``: for rows so few that reading all weights is what takes time.

    Computed in x's dtype, to which weights are cast, and accumulated in float32.

    Args:
        x: rows, the same for every group or each group's own.
        w_GKN: one weight a group.
        implementation: ``"xla"``, ``"pallas"`` (Hopper; bfloat16, up to 64 rows, K a multiple of 64 and N of 128) or
            ``"auto"``.

    Raises:
        ValueError: the implementation asked for cannot run.
    """
    w_GKN = w_GKN.astype(x.dtype)
    obstacles = {"pallas": every_group_sm90.obstacle(x, w_GKN)}
    if dispatch.choose("every_group_gemm", implementation, obstacles) == "pallas":
        return once(every_group_sm90.gemm)(x, w_GKN)
    x_GTK = jnp.broadcast_to(x, (w_GKN.shape[0], *x.shape[-2:]))
    precision = matmul_precision(x.dtype)
    y_GTN = jnp.einsum("gtk,gkn->gtn", x_GTK, w_GKN, precision=precision, preferred_element_type=jnp.float32)
    return y_GTN.astype(x.dtype)
