"""The grouped FP8 products against float64 products of dequantized operands, group by group."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_fp8_gemm import cases, grouped_fp8_gemm, grouped_fp8_wgrad, masked_fp8_gemm
from pallas_kernels.testing import assert_close

CONTIGUOUS, MASKED, WGRAD = cases.SMALL


def quantized(rng, shape, scale_shape):
    q = jnp.asarray(rng.standard_normal(shape, np.float32) * 100).astype(jnp.float8_e4m3fn)
    return q, jnp.asarray(rng.uniform(0.5, 2.0, scale_shape).astype(np.float32) / 448)


def dequantized(q, scale_of_row_and_block):
    along = np.repeat(np.asarray(scale_of_row_and_block, np.float64), 128, axis=1)[:, : q.shape[1]]
    return np.asarray(q, np.float64) * along


def weights(rng, case):
    n, blocks = case.columns, -(-case.dim_k // 128)
    w, sb = quantized(rng, (case.num_groups, n, case.dim_k), (case.num_groups, -(-n // 128), blocks))
    wide = [dequantized(w[g], np.repeat(np.asarray(sb[g]), 128, axis=0)[:n]) for g in range(case.num_groups)]
    return w, sb, wide


def test_each_block_of_rows_meets_its_groups_weight_and_spare_blocks_are_zero():
    rng = np.random.default_rng(0)
    q, sa = quantized(rng, (CONTIGUOUS.rows, CONTIGUOUS.dim_k), (2, CONTIGUOUS.rows))
    w, sb, wide = weights(rng, CONTIGUOUS)
    groups, used = CONTIGUOUS.group_of_block(), CONTIGUOUS.used_blocks
    y = grouped_fp8_gemm(q, sa, w, sb, jnp.asarray(groups), num_blocks=jnp.int32(used), dtype=jnp.float32)
    rows = dequantized(q, sa.T)
    for block, group in enumerate(groups[:used]):
        mine = slice(128 * block, 128 * (block + 1))
        assert_close(y[mine], rows[mine] @ wide[group].T)
    assert used < len(groups)
    np.testing.assert_array_equal(y[128 * used :], 0.0)
    assert grouped_fp8_gemm(q, sa, w, sb, jnp.asarray(groups)).dtype == jnp.bfloat16


def test_masked_rows_are_computed_and_the_others_zero_whatever_they_hold():
    rng = np.random.default_rng(1)
    groups, rows, counts = MASKED.num_groups, MASKED.max_rows, MASKED.rows_of_group
    q, sa = quantized(rng, (groups, rows, MASKED.dim_k), (groups, 2, rows))
    w, sb, wide = weights(rng, MASKED)
    unused = np.arange(rows)[None] >= np.asarray(counts)[:, None]
    q = jnp.where(jnp.asarray(unused)[:, :, None], jnp.float8_e4m3fn(jnp.nan), q)
    y = masked_fp8_gemm(q, sa, w, sb, jnp.asarray(counts, jnp.int32), dtype=jnp.float32)
    for g, count in enumerate(counts):
        assert_close(y[g, :count], dequantized(q[g, :count], sa[g, :, :count].T) @ wide[g].T)
        np.testing.assert_array_equal(y[g, count:], 0.0)


def test_weight_gradients_are_summed_by_group_and_empty_groups_are_exactly_zero():
    rng = np.random.default_rng(2)
    blocks = len(WGRAD.group_of_block())
    x, sx = quantized(rng, (WGRAD.dim_k, WGRAD.rows), (blocks, WGRAD.dim_k))
    dy, sdy = quantized(rng, (WGRAD.columns, WGRAD.rows), (blocks, WGRAD.columns))
    groups = jnp.asarray(WGRAD.group_of_block())
    options = {"num_groups": WGRAD.num_groups, "num_blocks": jnp.int32(WGRAD.used_blocks)}
    dw = grouped_fp8_wgrad(x, sx, dy, sdy, groups, **options)
    wide_x, wide_dy = dequantized(x, sx.T), dequantized(dy, sdy.T)
    first = 0
    for g, rows in enumerate(WGRAD.rows_of_group):
        end = first + -(-rows // 128) * 128
        assert_close(dw[g], wide_x[:, first:end] @ wide_dy[:, first:end].T)
        assert bool(jnp.any(dw[g])) == (rows > 0)
        first = end
    twice = grouped_fp8_wgrad(x, sx, dy, sdy, groups, into=dw, **options)
    np.testing.assert_array_equal(twice, 2 * dw)


def test_wrong_operands_are_one_clear_line():
    q, w = jnp.zeros((256, 128), jnp.float8_e4m3fn), jnp.zeros((2, 16, 128), jnp.float8_e4m3fn)
    groups = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="q_MK has M = 256, but group_of_block names 3 blocks of 128"):
        grouped_fp8_gemm(q, jnp.ones((1, 256)), w, jnp.ones((2, 1, 1)), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"sb_GNK must be float32 \(2, 1, 1\), got float32 \(2, 2, 1\)"):
        grouped_fp8_gemm(q, jnp.ones((1, 256)), w, jnp.ones((2, 2, 1)), groups)
    with pytest.raises(ValueError, match="implementation 'pallas' cannot run"):
        grouped_fp8_gemm(q, jnp.ones((1, 256)), w, jnp.ones((2, 1, 1)), groups, implementation="pallas")
    wrong = jnp.zeros((1, 256, 256))
    x = jnp.zeros((256, 256), jnp.float8_e4m3fn)
    with pytest.raises((ValueError, TypeError), match="into"):
        grouped_fp8_wgrad(x, jnp.ones((2, 256)), x, jnp.ones((2, 256)), groups, num_groups=2, into=wrong)
