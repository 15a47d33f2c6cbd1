"""The definitions, and the portable implementations: loops over 128-wide blocks of the contraction (spec 11.4)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import varying
from pallas_kernels.fp8_gemm.reference import BLOCK, block_product, contraction_blocks, spread_rows


def grouped_fp8_gemm(
    q_MK: Float[Array, "M K"],
    sa_KM: Float[Array, "KB M"],
    w_GNK: Float[Array, "G N K"],
    sb_GNK: Float[Array, "G NB KB"],
    group_of_block: Int[Array, " MB"],
    num_blocks: Int[Array, ""],
) -> Float[Array, "M N"]:
    """Each block of 128 rows times its group's weight, float32; zero in the blocks from ``num_blocks`` on."""
    blocks, columns = group_of_block.shape[0], w_GNK.shape[1]
    a_steps = contraction_blocks(q_MK.reshape(blocks, BLOCK, -1))
    sa_steps = sa_KM.reshape(-1, blocks, BLOCK)
    sb_steps = spread_rows(jnp.moveaxis(sb_GNK, -1, 0), columns)

    def add_block(acc_BMN: Array, step: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        a_BMK, w_GNK, sa_BM, sb_GN = step
        term_BMN = block_product("bmk,bnk->bmn", a_BMK, w_GNK[group_of_block])
        return acc_BMN + term_BMN * sa_BM[:, :, None] * sb_GN[group_of_block][:, None, :], None

    zeros = jnp.zeros((blocks, BLOCK, columns), jnp.float32)
    zeros = varying.like(zeros, q_MK, sa_KM, w_GNK, sb_GNK, group_of_block)
    acc_BMN = lax.scan(add_block, zeros, (a_steps, contraction_blocks(w_GNK), sa_steps, sb_steps))[0]
    used = jnp.arange(blocks) < num_blocks
    return jnp.where(used[:, None, None], acc_BMN, 0.0).reshape(-1, columns)


def masked_fp8_gemm(
    q_GMK: Float[Array, "G M K"],
    sa_GKM: Float[Array, "G KB M"],
    w_GNK: Float[Array, "G N K"],
    sb_GNK: Float[Array, "G NB KB"],
    counts_G: Int[Array, " G"],
) -> Float[Array, "G M N"]:
    """Each group's first ``counts_G`` rows times its weight, float32; zero in the rows after them."""
    (groups, rows, _), columns = q_GMK.shape, w_GNK.shape[1]
    sa_steps = jnp.moveaxis(sa_GKM, 1, 0)
    sb_steps = spread_rows(jnp.moveaxis(sb_GNK, -1, 0), columns)

    def add_block(acc_GMN: Array, step: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        a_GMK, w_GNK, sa_GM, sb_GN = step
        return acc_GMN + block_product("gmk,gnk->gmn", a_GMK, w_GNK) * sa_GM[:, :, None] * sb_GN[:, None, :], None

    zeros = varying.like(jnp.zeros((groups, rows, columns), jnp.float32), q_GMK, sa_GKM, w_GNK, sb_GNK, counts_G)
    steps = (contraction_blocks(q_GMK), contraction_blocks(w_GNK), sa_steps, sb_steps)
    acc_GMN = lax.scan(add_block, zeros, steps)[0]
    mine = jnp.arange(rows)[None, :] < counts_G[:, None]
    return jnp.where(mine[:, :, None], acc_GMN, 0.0)


def grouped_fp8_wgrad(
    x_KM: Float[Array, "K M"],
    sx_MK: Float[Array, "MB K"],
    dy_NM: Float[Array, "N M"],
    sdy_MN: Float[Array, "MB N"],
    group_of_block: Int[Array, " MB"],
    num_blocks: Int[Array, ""],
    *,
    num_groups: int,
) -> Float[Array, "G K N"]:
    """``dw[g] = x.T @ dy`` over the blocks of 128 tokens of group g, float32; zero for a group without blocks."""

    def add_block(dw_GKN: Array, step: tuple[Array, Array, Array, Array, Array, Array]) -> tuple[Array, None]:
        x_KT, dy_NT, sx_K, sdy_N, group, block = step
        term_KN = block_product("kt,nt->kn", x_KT, dy_NT) * sx_K[:, None] * sdy_N[None, :]
        term_KN = jnp.where(block < num_blocks, term_KN, 0.0)
        total_KN = lax.dynamic_index_in_dim(dw_GKN, group, keepdims=False) + term_KN
        return lax.dynamic_update_index_in_dim(dw_GKN, total_KN, group, 0), None

    zeros = jnp.zeros((num_groups, x_KM.shape[0], dy_NM.shape[0]), jnp.float32)
    zeros = varying.like(zeros, x_KM, sx_MK, dy_NM, sdy_MN, group_of_block)
    blocks = jnp.arange(group_of_block.shape[0])
    steps = (contraction_blocks(x_KM), contraction_blocks(dy_NM), sx_MK, sdy_MN, group_of_block, blocks)
    return lax.scan(add_block, zeros, steps)[0]
