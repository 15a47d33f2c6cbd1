"""The public quantizers: results on awkward shapes, messages, and what must not happen silently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize import (
    Weight,
    cases,
    check_finite,
    quantize_both,
    quantize_columns,
    quantize_rows,
    quantize_weight,
    reference,
    requantize_columns,
)


@pytest.mark.parametrize("case", cases.EDGES, ids=lambda case: case.name)
def test_edges_count_as_zeros(case):
    x = jnp.asarray(case.array())
    padded = np.pad(x, [(0, -size % 128) for size in x.shape])
    (rows, columns), (padded_rows, padded_columns) = jax.jit(
        lambda x, padded: (quantize_both(x), reference.quantize_both(padded))
    )(x, padded)
    m, k = case.shape
    np.testing.assert_array_equal(rows.q, padded_rows.q[:m, :k])
    np.testing.assert_array_equal(rows.scale, padded_rows.scale[:, :m])
    np.testing.assert_array_equal(columns.q, padded_columns.q[:k, :m])
    np.testing.assert_array_equal(columns.scale, padded_columns.scale[:, :k])
    assert jax.eval_shape(requantize_columns, *rows) == jax.eval_shape(quantize_columns, x)


def test_a_weight_comes_in_both_orientations_with_leading_dims():
    w = jnp.asarray(cases.Case("w", (2, 3, 130, 200)).array())
    got = jax.jit(quantize_weight)(w)
    assert isinstance(got, Weight)
    assert [a.shape for a in got] == [(2, 3, 200, 130), (2, 3, 2, 2), (2, 3, 130, 200), (2, 3, 2, 2)]
    q, scale = jax.jit(reference.quantize_blocks)(w)
    for turned, plain, expected in ((got.q_NK, got.q_KN, q), (got.scale_NK, got.scale_KN, scale)):
        np.testing.assert_array_equal(plain, expected)
        np.testing.assert_array_equal(turned, expected.mT)


def test_differentiating_a_quantizer_raises():
    def loss(x):
        return quantize_rows(x).scale.sum()

    with pytest.raises(TypeError, match="quantize_rows has no gradient"):
        jax.grad(loss)(jnp.ones((1, 128)))


def test_values_that_are_not_finite_are_refused_outside_jit():
    x = jnp.ones((4, 128))
    check_finite(x, "x")
    with pytest.raises(ValueError, match=r"dy: 2 values are not finite, the first at \(1, 7\)"):
        check_finite(x.at[1, 7].set(jnp.inf).at[2, 0].set(jnp.nan), "dy")


def test_the_hopper_kernel_asked_for_on_a_cpu_raises():
    with pytest.raises(ValueError, match="quantize_rows: implementation 'pallas' cannot run"):
        quantize_rows(jnp.ones((128, 128), jnp.bfloat16), implementation="pallas")


def test_it_works_inside_shard_map_with_checked_replication_and_in_a_rematerialized_scan():
    x = jnp.asarray(cases.Case("x", (8, 256)).array())
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x):
        return quantize_rows(x).q

    sharded = jax.shard_map(local, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    expected = np.asarray(quantize_rows(x).q, np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(sharded)(x), np.float32), expected)

    @jax.custom_vjp
    def straight_through(x):
        tiles = quantize_rows(x)
        return reference.dequantize_rows(*tiles)

    straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, dy: (dy,))

    def loss(x):
        return jax.lax.scan(jax.checkpoint(lambda c, row: (c, straight_through(row[None]).sum())), 0, x)[1].sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), 1.0)
