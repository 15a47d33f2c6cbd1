"""``grouped_gemm``: the public function with its gradient and the choice of implementation."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.grouped_gemm import pallas_sm90, xla
from pallas_kernels.once import once


@jax.named_scope("grouped_gemm")
def grouped_gemm(
    x_MK: Float[Array, "M K"],
    w_GKN: Float[Array, "G K N"],
    group_of_block: Int[Array, " NB"],
    *,
    block: int,
    num_blocks: Int[Array, ""] | None = None,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "M N"]:
    """``y[m] = x[m] @ w[group_of_block[m // block]]``, a plan's rows through their experts' weights.

    The product is computed in ``x_MK``'s dtype and accumulated in float32; ``w_GKN`` may be a float32 master, which is
    cast on the way in, forward and backward, and not kept. Its gradient is accumulated in float32 and returned in the
    dtype of ``w_GKN``: for a master it is never rounded below float32.

    The Hopper kernel takes bfloat16 or float16 rows, blocks of a multiple of 128 rows, and K and N that are multiples
    of 128; ``auto`` falls back to XLA elsewhere.

    Args:
        x_MK: rows, ``M = NB * block``.
        w_GKN: one weight a group.
        group_of_block: group of each block of rows, never decreasing, in ``[0, G)``. A group may have no block; its
            gradient is then exactly zero.
        block: rows in a block.
        num_blocks: blocks in use. Rows past ``num_blocks * block`` must be zero, in ``x_MK`` and in the incoming
            gradient (as ``permute`` and ``unpermute`` make them); the result there is zero. None: all are in use.
            It saves the Hopper kernel work and changes no result.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``.

    Returns:
        ``[M, N]`` in the dtype of ``x_MK``.

    Raises:
        ValueError: shapes do not fit together, or the implementation asked for cannot run.
    """
    chosen, num_blocks = _choose(x_MK, w_GKN, group_of_block, block, num_blocks, implementation)
    return _grouped_gemm(x_MK, w_GKN, group_of_block, num_blocks, block, chosen)


@jax.named_scope("grouped_gemm")
def grouped_gemm_backward(
    x_MK: Float[Array, "M K"],
    w_GKN: Float[Array, "G K N"],
    dy_MN: Float[Array, "M N"],
    group_of_block: Int[Array, " NB"],
    *,
    block: int,
    num_blocks: Int[Array, ""] | None = None,
    implementation: dispatch.Implementation = "auto",
) -> tuple[Float[Array, "M K"], Float[Array, "G K N"]]:
    """Gradients of :func:`grouped_gemm`'s two operands, for a caller with a backward pass of its own.

    Args:
        x_MK: rows of the forward pass.
        w_GKN: its weights.
        dy_MN: gradient of the output, in the dtype of ``x_MK``.
        group_of_block: as there.
        block: as there.
        num_blocks: as there; rows of ``x_MK`` and ``dy_MN`` past it must be zero.
        implementation: as there.

    Raises:
        ValueError: shapes do not fit together, or the implementation asked for cannot run.
    """
    chosen, num_blocks = _choose(x_MK, w_GKN, group_of_block, block, num_blocks, implementation)
    dx, dw, _, _ = _backward(block, chosen, (x_MK, w_GKN, group_of_block, num_blocks), dy_MN)
    return dx, dw


def _choose(
    x_MK: Array, w_GKN: Array, group_of_block: Array, block: int, num_blocks: Array | None, implementation: str
) -> tuple[str, Array]:
    """The implementation, and how many blocks are in use."""
    (rows, dim_k), (_, w_dim_k, _) = x_MK.shape, w_GKN.shape
    if dim_k != w_dim_k:
        raise ValueError(f"grouped_gemm: x_MK has K = {dim_k}, w_GKN has K = {w_dim_k}")
    if block < 1 or rows != block * group_of_block.shape[0]:
        raise ValueError(
            f"grouped_gemm: x_MK has {rows} rows, but group_of_block names {group_of_block.shape[0]} blocks of {block}"
        )
    chosen = dispatch.choose("grouped_gemm", implementation, {"pallas": pallas_sm90.obstacle(x_MK, w_GKN, block)})
    return chosen, jnp.asarray(group_of_block.shape[0], jnp.int32) if num_blocks is None else num_blocks


def _gemm(
    x: Array, w: Array, group_of_block: Array, num_blocks: Array, block: int, chosen: str, transpose_w: bool
) -> Array:
    with jax.named_scope("cast"):
        w = w.astype(x.dtype)
    if chosen == "pallas":
        return once(pallas_sm90.gemm, block=block, transpose_w=transpose_w)(x, w, group_of_block, num_blocks)
    return xla.gemm(x, w, group_of_block, block=block, transpose_w=transpose_w)


def _wgrad(
    x: Array, dy: Array, group_of_block: Array, num_blocks: Array, block: int, chosen: str, num_groups: int
) -> Array:
    if chosen == "pallas":
        return once(pallas_sm90.wgrad, block=block, num_groups=num_groups)(x, dy, group_of_block, num_blocks)
    return xla.wgrad(x, dy, group_of_block, block=block, num_groups=num_groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_gemm(x: Array, w: Array, group_of_block: Array, num_blocks: Array, block: int, chosen: str) -> Array:
    return _gemm(x, w, group_of_block, num_blocks, block, chosen, transpose_w=False)


_Saved = tuple[Array, Array, Array, Array]


def _forward(
    x: Array, w: Array, group_of_block: Array, num_blocks: Array, block: int, chosen: str
) -> tuple[Array, _Saved]:
    return _grouped_gemm(x, w, group_of_block, num_blocks, block, chosen), (x, w, group_of_block, num_blocks)


def _backward(block: int, chosen: str, saved: _Saved, dy: Array) -> tuple[Array, Array, None, None]:
    x, w, group_of_block, num_blocks = saved
    dx = _gemm(dy, w, group_of_block, num_blocks, block, chosen, transpose_w=True)
    dw = _wgrad(x, dy, group_of_block, num_blocks, block, chosen, w.shape[0])
    return dx, dw.astype(w.dtype), None, None


_grouped_gemm.defvjp(_forward, _backward)
