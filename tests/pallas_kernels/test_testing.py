"""The error metrics, the FLOP counter and the timer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing


def test_relative_l2_is_the_norm_of_the_difference_over_the_norm():
    assert testing.relative_l2([3.0, 5.0], [3.0, 4.0]) == pytest.approx(1 / 5)
    assert testing.relative_l2([0.5], [0.0]) == 0.5


def test_calc_diff_is_zero_for_equal_and_two_for_opposite_arrays():
    x = np.arange(1.0, 5.0)
    assert testing.calc_diff(x, x) == pytest.approx(0.0, abs=1e-15)
    assert testing.calc_diff(x, -x) == pytest.approx(2.0)
    assert testing.calc_diff(0 * x, 0 * x) == 0.0


def test_assert_close_fails_on_error_shape_and_nan():
    good = jnp.ones(4, jnp.bfloat16)
    testing.assert_close(good, np.ones(4))
    for bad in (good * 1.1, good.at[0].set(jnp.nan), jnp.ones(5, jnp.bfloat16)):
        with pytest.raises(AssertionError):
            testing.assert_close(bad, np.ones(4))


def test_matmul_flops_counts_scans_at_full_length_and_gradients():
    x, w = jnp.ones((6, 4)), jnp.ones((4, 4))
    assert testing.matmul_flops(lambda x, w: x @ w, x, w) == 2 * 6 * 4 * 4

    def scanned(x, w):
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, length=5)[0].sum()

    assert testing.matmul_flops(scanned, x, w) == 5 * 2 * 6 * 4 * 4
    assert testing.matmul_flops(jax.jit(jax.grad(scanned, argnums=1)), x, w) == 3 * 5 * 2 * 6 * 4 * 4


def test_matmul_flops_refuses_a_product_in_a_loop_of_unknown_length():
    def looped(x):
        return jax.lax.while_loop(lambda c: c.sum() < 1e3, lambda c: c @ c, x)

    with pytest.raises(NotImplementedError):
        testing.matmul_flops(looped, jnp.ones((3, 3)))


def test_the_timer_tells_a_long_program_from_a_short_one():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((256, 256)), jnp.float32)
    short = testing.median_microseconds(lambda x: x @ x, x, repeats=5)
    long = testing.median_microseconds(lambda x: jax.lax.fori_loop(0, 64, lambda _, c: c @ x * 0.01, x), x, repeats=5)
    assert 0 < short < long


def test_the_sustained_time_of_a_call_is_of_the_order_of_the_median():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((512, 512)), jnp.float32)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, c: c @ x * 0.01, x))
    once = testing.median_microseconds(chain, x, repeats=5)
    assert once / 10 < testing.sustained_microseconds(chain, x, seconds=0.1) < 10 * once
