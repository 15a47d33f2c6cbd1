"""``grouped_fp8_gemm``, ``masked_fp8_gemm``, ``grouped_fp8_wgrad``: the public functions and what implements them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.fp8_gemm.op import check_into, check_operand
from pallas_kernels.fp8_gemm.pallas_sm90 import gemm_obstacle, wgrad_obstacle
from pallas_kernels.fp8_gemm.reference import BLOCK
from pallas_kernels.grouped_fp8_gemm import pallas_sm90, reference
from pallas_kernels.once import once


@jax.named_scope("grouped_gemm")
def grouped_fp8_gemm(
    q_MK: Float[Array, "M K"],
    sa_KM: Float[Array, "KB M"],
    w_GNK: Float[Array, "G N K"],
    sb_GNK: Float[Array, "G NB KB"],
    group_of_block: Int[Array, " MB"],
    *,
    num_blocks: Int[Array, ""] | None = None,
    dtype: Any = jnp.bfloat16,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "M N"]:
    """``y[m] = x[m] @ w[group_of_block[m // 128]].T`` of quantized ``x`` and ``w``: a plan's rows and their experts.

    Accumulated in float32 each 128 of K (spec 11.4). The Hopper kernel takes K in multiples of 128 and N in multiples
    of 8; ``auto`` falls back to XLA elsewhere. It has no gradient of its own.

    Args:
        q_MK: e4m3fn rows sorted by group, each group's padded to whole blocks of 128.
        sa_KM: float32 scale of each 1x128 tile of them, ``[ceil(K / 128), M]``.
        w_GNK: e4m3fn weights, contraction last.
        sb_GNK: float32 scale of each 128x128 block of them, ``[G, ceil(N / 128), ceil(K / 128)]``.
        group_of_block: int32 group of each block of 128 rows, in ``[0, G)``. A group may have no block.
        num_blocks: blocks in use; the rows after them are zeros in the result. None: all are in use.
        dtype: of the result; bfloat16 or float32 for the Hopper kernel.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``.

    Returns:
        ``[M, N]``.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation asked for cannot run.
    """
    (rows, dim_k), (groups, columns, w_dim_k) = q_MK.shape, w_GNK.shape
    if dim_k != w_dim_k:
        raise ValueError(f"grouped_fp8_gemm: q_MK has K = {dim_k}, w_GNK has K = {w_dim_k}")
    _check_blocks("grouped_fp8_gemm", "q_MK", rows, group_of_block)
    steps = -(-dim_k // BLOCK)
    check_operand("grouped_fp8_gemm", "q_MK", q_MK, "sa_KM", sa_KM, (steps, rows))
    check_operand("grouped_fp8_gemm", "w_GNK", w_GNK, "sb_GNK", sb_GNK, (groups, -(-columns // BLOCK), steps))
    used = _used(num_blocks, group_of_block)
    obstacle = gemm_obstacle(q_MK, w_GNK, dtype)
    if dispatch.choose("grouped_fp8_gemm", implementation, {"pallas": obstacle}) == "pallas":
        return once(pallas_sm90.gemm, dtype=dtype)(q_MK, sa_KM, w_GNK, sb_GNK, group_of_block, used)
    return reference.grouped_fp8_gemm(q_MK, sa_KM, w_GNK, sb_GNK, group_of_block, used).astype(dtype)


def masked_fp8_gemm(
    q_GMK: Float[Array, "G M K"],
    sa_GKM: Float[Array, "G KB M"],
    w_GNK: Float[Array, "G N K"],
    sb_GNK: Float[Array, "G NB KB"],
    counts_G: Int[Array, " G"],
    *,
    dtype: Any = jnp.bfloat16,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "G M N"]:
    """``y[g] = x[g] @ w[g].T`` for the first ``counts_G[g]`` of each group's rows, as decoding has them.

    The Hopper kernel takes K in multiples of 128, M and N in multiples of 8; ``auto`` falls back to
    XLA elsewhere. It has no gradient.

    Args:
        q_GMK: e4m3fn rows; those from ``counts_G`` on may hold anything.
        sa_GKM: float32 scale of each 1x128 tile of them, ``[G, ceil(K / 128), M]``.
        w_GNK: e4m3fn weights, contraction last.
        sb_GNK: float32 scale of each 128x128 block of them, ``[G, ceil(N / 128), ceil(K / 128)]``.
        counts_G: int32 rows in use, at most M.
        dtype: of the result; bfloat16 or float32 for the Hopper kernel.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``.

    Returns:
        ``[G, M, N]``, zero in the rows from ``counts_G`` on.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation asked for cannot run.
    """
    (groups, rows, dim_k), (w_groups, columns, w_dim_k) = q_GMK.shape, w_GNK.shape
    if (groups, dim_k) != (w_groups, w_dim_k):
        raise ValueError(f"masked_fp8_gemm: q_GMK has shape {q_GMK.shape}, w_GNK {w_GNK.shape}")
    steps = -(-dim_k // BLOCK)
    check_operand("masked_fp8_gemm", "q_GMK", q_GMK, "sa_GKM", sa_GKM, (groups, steps, rows))
    check_operand("masked_fp8_gemm", "w_GNK", w_GNK, "sb_GNK", sb_GNK, (groups, -(-columns // BLOCK), steps))
    obstacle = gemm_obstacle(q_GMK, w_GNK, dtype)
    if dispatch.choose("masked_fp8_gemm", implementation, {"pallas": obstacle}) == "pallas":
        return once(pallas_sm90.masked, dtype=dtype)(q_GMK, sa_GKM, w_GNK, sb_GNK, counts_G)
    return reference.masked_fp8_gemm(q_GMK, sa_GKM, w_GNK, sb_GNK, counts_G).astype(dtype)


@jax.named_scope("grouped_gemm")
def grouped_fp8_wgrad(
    x_KM: Float[Array, "K M"],
    sx_MK: Float[Array, "MB K"],
    dy_NM: Float[Array, "N M"],
    sdy_MN: Float[Array, "MB N"],
    group_of_block: Int[Array, " MB"],
    *,
    num_groups: int,
    num_blocks: Int[Array, ""] | None = None,
    into: Float[Array, "G K N"] | None = None,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "G K N"]:
    """``dw[g] = x.T @ dy`` over the tokens of group g, of operands quantized in 128x1 tiles and laid out tokens last.

    The Hopper kernel takes K and N in multiples of 8; ``auto`` falls back to XLA elsewhere.

    Args:
        x_KM: e4m3fn inputs, transposed; M is sorted by group, each group's part whole blocks of 128.
        sx_MK: float32 scale of each tile of 128 tokens by one channel, ``[M / 128, K]``.
        dy_NM: e4m3fn gradient of the output, transposed.
        sdy_MN: its scales, ``[M / 128, N]``.
        group_of_block: int32 group of each block of 128 tokens, never decreasing. A group may have no block.
        num_groups: G.
        num_blocks: blocks in use; what comes after them is left out. None: all are in use.
        into: float32 array to add the result to; in place where the caller's ``jax.jit`` donates it.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``.

    Returns:
        Float32 ``[G, K, N]``: ``dw``, exactly zero for a group without blocks, or ``into + dw``.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation asked for cannot run.
    """
    (rows, tokens), (columns, dy_tokens) = x_KM.shape, dy_NM.shape
    if tokens != dy_tokens:
        raise ValueError(f"grouped_fp8_wgrad: x_KM has M = {tokens}, dy_NM has M = {dy_tokens}")
    _check_blocks("grouped_fp8_wgrad", "x_KM", tokens, group_of_block)
    steps = group_of_block.shape[0]
    check_operand("grouped_fp8_wgrad", "x_KM", x_KM, "sx_MK", sx_MK, (steps, rows))
    check_operand("grouped_fp8_wgrad", "dy_NM", dy_NM, "sdy_MN", sdy_MN, (steps, columns))
    check_into("grouped_fp8_wgrad", into, (num_groups, rows, columns))
    used = _used(num_blocks, group_of_block)
    operands = (x_KM, sx_MK, dy_NM, sdy_MN, group_of_block, used)
    obstacle = wgrad_obstacle(x_KM, dy_NM)
    if dispatch.choose("grouped_fp8_wgrad", implementation, {"pallas": obstacle}) == "pallas":
        return once(pallas_sm90.wgrad, num_groups=num_groups)(*operands, into=into)
    dw_GKN = reference.grouped_fp8_wgrad(*operands, num_groups=num_groups)
    return dw_GKN if into is None else into + dw_GKN


def _check_blocks(operation: str, name: str, rows: int, group_of_block: Array) -> None:
    if rows != BLOCK * group_of_block.shape[0]:
        raise ValueError(
            f"{operation}: {name} has M = {rows}, but group_of_block names {group_of_block.shape[0]} blocks of {BLOCK}"
        )


def _used(num_blocks: Array | None, group_of_block: Array) -> Array:
    return jnp.asarray(group_of_block.shape[0], jnp.int32) if num_blocks is None else num_blocks
