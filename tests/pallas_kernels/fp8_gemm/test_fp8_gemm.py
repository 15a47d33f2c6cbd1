"""The dense FP8 products against float64 products of dequantized operands, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_gemm import cases, fp8_gemm, fp8_wgrad
from pallas_kernels.testing import assert_close, calc_diff


def quantized(rng, shape, scale_shape):
    q = jnp.asarray(rng.standard_normal(shape, np.float32) * 100).astype(jnp.float8_e4m3fn)
    return q, jnp.asarray(rng.uniform(0.5, 2.0, scale_shape).astype(np.float32) / 448)


def dequantized(q, scale_of_row_and_block):
    """Float64 values of q [R, K], its scales given for each row and block of 128 along K."""
    along = np.repeat(np.asarray(scale_of_row_and_block, np.float64), 128, axis=1)[:, : q.shape[1]]
    return np.asarray(q, np.float64) * along


def weight_rows(sb, columns):
    return np.repeat(np.asarray(sb), 128, axis=0)[:columns]


def gemm_operands(case, seed=0):
    rng = np.random.default_rng(seed)
    m, n, k = case.rows, case.columns, case.dim_k
    blocks = -(-k // 128)
    return *quantized(rng, (m, k), (blocks, m)), *quantized(rng, (n, k), (-(-n // 128), blocks))


def wgrad_operands(rows, columns, tokens, seed=0):
    rng = np.random.default_rng(seed)
    blocks = -(-tokens // 128)
    return *quantized(rng, (rows, tokens), (blocks, rows)), *quantized(rng, (columns, tokens), (blocks, columns))


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_the_product_equals_that_of_the_dequantized_operands(case):
    q, sa, w, sb = gemm_operands(case)
    expected = dequantized(q, sa.T) @ dequantized(w, weight_rows(sb, case.columns)).T
    assert_close(fp8_gemm(q, sa, w, sb, dtype=jnp.float32), expected)
    y = fp8_gemm(q, sa, w, sb)
    assert y.dtype == jnp.bfloat16
    assert_close(y, expected)


def test_zero_tiles_outliers_and_denormals_come_through():
    q, sa, w, sb = gemm_operands(cases.Case("gemm", 8, 16, 384))
    q = q.at[:, 128:256].set(0).at[3, 300].set(448).at[4, :128].set(2.0**-9)
    sa = sa.at[1].set(1e-4 / 448).at[2, 3].set(1e6)
    expected = dequantized(q, sa.T) @ dequantized(w, weight_rows(sb, 16)).T
    y = fp8_gemm(q, sa, w, sb, dtype=jnp.float32)
    for row in range(8):
        assert_close(y[row], expected[row])


def test_the_weight_gradient_equals_that_of_the_dequantized_operands_and_adds_up():
    x, sx, dy, sdy = wgrad_operands(24, 40, 300)
    expected = dequantized(x, sx.T) @ dequantized(dy, sdy.T).T
    dw = fp8_wgrad(x, sx, dy, sdy)
    assert dw.dtype == jnp.float32
    assert_close(dw, expected)
    assert_close(fp8_wgrad(x, sx, dy, sdy, into=dw), 2 * expected)


def test_each_block_of_128_is_scaled_on_its_own():
    q, sa, w, sb = gemm_operands(cases.Case("gemm", 4, 8, 256))
    only_first = fp8_gemm(q, sa.at[1].set(0), w, sb, dtype=jnp.float32)
    alone = fp8_gemm(q[:, :128], sa[:1], w[:, :128], sb[:, :1], dtype=jnp.float32)
    np.testing.assert_array_equal(only_first, alone)
    assert calc_diff(only_first, fp8_gemm(q, sa, w, sb, dtype=jnp.float32)) > 0.1


def test_it_works_inside_shard_map_with_checked_replication():
    q, sa, w, sb = gemm_operands(cases.Case("gemm", 8, 16, 256))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (jax.P("data"), jax.P(None, "data"), jax.P(), jax.P())
    sharded = jax.shard_map(
        lambda *operands: fp8_gemm(*operands, dtype=jnp.float32), mesh=mesh, in_specs=specs, out_specs=jax.P("data")
    )
    np.testing.assert_allclose(jax.jit(sharded)(q, sa, w, sb), fp8_gemm(q, sa, w, sb, dtype=jnp.float32), rtol=1e-5)


def test_wrong_operands_are_one_clear_line():
    q, sa, w, sb = gemm_operands(cases.Case("gemm", 8, 16, 256))
    wrong = (ValueError, TypeError)  # a TypeError where jaxtyping checks first
    with pytest.raises(wrong, match="K"):
        fp8_gemm(q[:, :128], sa[:1], w, sb)
    with pytest.raises(ValueError, match=r"sb_NK must be float32 \(1, 2\), got float32 \(2, 2\)"):
        fp8_gemm(q, sa, w, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="q_MK must be float8_e4m3fn, got bfloat16"):
        fp8_gemm(q.astype(jnp.bfloat16), sa, w, sb)
    with pytest.raises(ValueError, match="implementation 'pallas' cannot run"):
        fp8_gemm(q, sa, w, sb, implementation="pallas")
    x, sx, dy, sdy = wgrad_operands(24, 40, 256)
    with pytest.raises(wrong, match="into"):
        fp8_wgrad(x, sx, dy, sdy, into=jnp.zeros((24, 40), jnp.bfloat16))
