"""The quantizers' definition against NumPy, the goldens of spec 24 and the properties of spec 28."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantize import reference

F8 = ml_dtypes.float8_e4m3fn
quantize_rows = jax.jit(reference.quantize_rows, static_argnums=1)
quantize_columns = jax.jit(reference.quantize_columns, static_argnums=1)
requantize_columns = jax.jit(reference.requantize_columns, static_argnums=2)


def numpy_tile(x, power_of_two=False):
    """Spec 11.3 for one tile, in NumPy."""
    x = np.asarray(x, np.float32)
    scale = np.maximum(np.abs(x).max(), np.float32(1e-4)) / np.float32(448)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)
        scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
    return (x / scale).astype(F8), scale


def numpy_rows(x, power_of_two=False):
    q, scale = np.zeros(x.shape, F8), np.zeros((-(-x.shape[1] // 128), x.shape[0]), np.float32)
    for m in range(x.shape[0]):
        for b in range(scale.shape[0]):
            tile = slice(b * 128, (b + 1) * 128)
            q[m, tile], scale[b, m] = numpy_tile(x[m, tile], power_of_two)
    return q, scale


def same(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))


def rows_of_all_magnitudes(rows=64, dim_k=300, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, dim_k)) * 2.0 ** rng.integers(-20, 20, (rows, 1)) * 2.0 ** rng.integers(-9, 1, dim_k)
    return x.astype(dtype)


def spec_tile():
    j = np.arange(128)
    return np.sin(0.1 * j).astype(np.float64) * (1 + 0.01 * j)


def test_rounding_in_float32_is_the_conversion_to_e4m3():
    codes = np.arange(256, dtype=np.uint8).view(F8).astype(np.float32)
    codes = np.unique(codes[np.isfinite(codes)])
    between = (codes[1:] + codes[:-1]) / 2
    near = [np.nextafter(between, np.float32(to)) for to in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    spread = rng.uniform(-1, 1, 10_000) * 2.0 ** rng.integers(-14, 9, 10_000)
    x = np.concatenate([codes, between, *near, spread, [-0.0, 1e-40, -1e-40]]).astype(np.float32)
    same(jax.jit(reference.round_to_e4m3)(x), x.astype(F8).astype(np.float32))


@pytest.mark.gpu
def test_codes_that_are_widened_in_the_same_program_are_rounded_before():
    x = jnp.asarray(rows_of_all_magnitudes(), jnp.bfloat16)
    alone = jax.jit(reference.dequantize_rows)(*quantize_rows(x))
    same(jax.jit(lambda x: reference.dequantize_rows(*reference.quantize_rows(x)))(x), alone)


@pytest.mark.parametrize(
    ("power_of_two", "scale", "values", "codes", "error"),
    [
        (False, 0.0046874541, [0, 22, 44, 64, 88, 104, 128, 144], [0, 91, 99, 104, 107, 109, 112, 113], 0.0246017),
        (True, 2.0**-7, [0, 13, 26, 40, 52, 64, 80, 88], [0, 85, 93, 98, 101, 104, 106, 107], 0.0263988),
    ],
)
def test_the_tile_of_the_specification(power_of_two, scale, values, codes, error):
    x = jnp.asarray(spec_tile()[None], jnp.float32)
    q, s = quantize_rows(x, power_of_two)
    assert float(s[0, 0]) == pytest.approx(scale, rel=1e-8)
    np.testing.assert_array_equal(q[0, :8].astype(jnp.float32), values)
    np.testing.assert_array_equal(np.asarray(q)[0, :8].view(np.uint8), codes)
    difference = np.asarray(reference.dequantize_rows(q, s) - x, np.float64)
    assert np.linalg.norm(difference) / np.linalg.norm(x) == pytest.approx(error, rel=1e-5)
    if not power_of_two:
        assert np.abs(difference).max() == pytest.approx(0.0733809, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "power_of_two", "compiled"),
    [
        (np.float32, False, True),
        (np.float32, False, False),
        (np.float32, True, True),
        (ml_dtypes.bfloat16, False, True),
    ],
)
def test_rows_and_columns_equal_numpy_bit_for_bit(dtype, power_of_two, compiled):
    x = rows_of_all_magnitudes(dtype=dtype)
    for function, given in ((reference.quantize_rows, x), (reference.quantize_columns, x.T)):
        run = jax.jit(function, static_argnums=1) if compiled else function
        q, scale = run(jnp.asarray(given), power_of_two)
        expected_q, expected_scale = numpy_rows(x, power_of_two)
        same(q, expected_q)
        same(scale, expected_scale)


def test_quotients_that_round_to_a_tie_in_float32_round_twice():
    scale = np.nextafter(np.float32(448.0), np.float32(449.0)) / np.float32(448)
    assert scale == np.float32(1 + 2.0**-23)
    halfway = np.float32(17.0)  # between 16 and 18, the even one of which is 16
    x = np.zeros((1, 128), np.float32)
    x[0, 0] = 448 * scale
    x[0, 1:4] = [np.nextafter(halfway * scale, np.float32(0)), halfway * scale, np.nextafter(halfway * scale, 99)]
    q, s = jax.jit(reference.quantize_rows)(jnp.asarray(x))
    expected_q, expected_s = numpy_rows(x)
    same(s, expected_s)
    same(q, expected_q)


@pytest.mark.parametrize(("shape", "power_of_two"), [((2, 130, 200), False), ((128, 128), True)], ids=str)
def test_blocks_equal_numpy_and_their_transpose(shape, power_of_two):
    w = rows_of_all_magnitudes(int(np.prod(shape[:-1])), shape[-1]).reshape(shape)
    q, scale = jax.jit(reference.quantize_blocks, static_argnums=1)(jnp.asarray(w), power_of_two)
    assert scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    for index in np.ndindex(*scale.shape):
        *lead, r, c = index
        block = (*lead, slice(r * 128, (r + 1) * 128), slice(c * 128, (c + 1) * 128))
        expected_q, expected_scale = numpy_tile(w[block], power_of_two)
        same(np.ascontiguousarray(np.asarray(q)[block]), expected_q)
        assert np.asarray(scale)[index] == expected_scale
    q_t, scale_t = jax.jit(reference.quantize_blocks, static_argnums=1)(jnp.asarray(w).mT, power_of_two)
    same(q_t.mT, q)
    same(scale_t.mT, scale)
    x = np.asarray(reference.dequantize_blocks(q, scale))
    assert np.abs(x - w).max() <= 2.0**-4 * np.abs(w).max()


def test_powers_of_two_round_up_and_stay_where_they_are_exact():
    up = np.nextafter(np.float32(1), 2)
    values = np.array([1.0, up, 2.0, 3.0, 2.0**-22, 1e-4 / 448, 7e35, np.inf, np.nan, -np.nan], np.float32)
    got = reference.round_up_to_power_of_two(jnp.asarray(values))
    np.testing.assert_array_equal(got, [1.0, 2.0, 2.0, 4.0, 2.0**-22, 2.0**-22, 2.0**120, *[np.inf] * 3])


def test_zero_and_tiny_tiles_take_the_floor_and_constant_tiles_the_top_code():
    x = jnp.stack([jnp.zeros(128), jnp.full(128, 1e-41), jnp.full(128, 3e-5), jnp.full(128, -7.0)])
    q, scale = quantize_rows(x)
    floor = np.float32(1e-4) / np.float32(448)
    np.testing.assert_array_equal(scale[0, :3], floor)
    np.testing.assert_array_equal(q[:2].astype(jnp.float32), 0.0)
    np.testing.assert_array_equal(q[3].astype(jnp.float32), -448.0)
    assert not np.isnan(np.asarray(q, np.float32)).any()


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_one_value_that_is_not_finite_among_many_is_never_lost(power_of_two, compiled):
    x = np.random.default_rng(3).standard_normal((512, 384)).astype(jnp.bfloat16)
    places = {(3, 5): np.inf, (130, 127): -np.inf, (200, 300): np.nan, (511, 383): -np.nan, (300, 128): np.nan}
    for place, bad in places.items():
        x[place] = bad
    finite = np.isfinite(x.astype(np.float32))
    rows = finite.reshape(512, 3, 128).all(2).T
    columns = finite.reshape(4, 128, 384).all(1)
    blocks = rows.reshape(3, 4, 128).all(2).T

    def check(made, finite_scales, finite_values):
        q, scale = map(np.asarray, made)
        np.testing.assert_array_equal(np.isfinite(scale), finite_scales)
        assert (scale > 0)[finite_scales].all()
        assert not q[~finite_values].view(np.uint8).any()
        assert np.isfinite(q.astype(np.float32)).all()

    functions = reference.quantize_rows, reference.quantize_columns, reference.quantize_blocks
    by_row, by_column, by_block = (
        (jax.jit(function, static_argnums=1) if compiled else function)(jnp.asarray(x), power_of_two)
        for function in functions
    )
    in_rows = np.repeat(rows.T, 128, axis=1)
    check(by_row, rows, in_rows)
    check(by_column, columns, np.repeat(columns.T, 128, axis=1))
    check(by_block, blocks, np.repeat(np.repeat(blocks, 128, axis=0), 128, axis=1))
    again = in_rows.reshape(4, 128, 384).all(1)
    requantize = requantize_columns if compiled else reference.requantize_columns
    check(requantize(*by_row, power_of_two), again, np.repeat(again.T, 128, axis=1))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_spoils_its_tile_alone_and_makes_no_nan_code(bad):
    x = np.ones((2, 256), np.float32)
    x[0, 3] = bad
    q, scale = jax.jit(reference.quantize_rows)(jnp.asarray(x))
    assert not np.isnan(np.asarray(q, np.float32)).any()
    assert not np.isfinite(scale[0, 0])
    assert np.isfinite(np.delete(np.asarray(scale).ravel(), 0)).all()
    back = np.asarray(reference.dequantize_rows(q, scale))
    assert np.isnan(back[0, :128]).all()
    np.testing.assert_allclose(back[0, 128:], 1.0)
    np.testing.assert_allclose(back[1], 1.0)


def test_round_trip_error_is_at_most_a_sixteenth_and_an_outlier_damages_only_its_tile():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 512)), jnp.float32)
    q, scale = quantize_rows(x)
    back = reference.dequantize_rows(q, scale)
    normal = np.abs(np.asarray(q, np.float32)) >= 2.0**-6
    assert (np.abs(back - x) <= 2.0**-4 * np.abs(x))[normal].all()
    spoiled = reference.dequantize_rows(*quantize_rows(x.at[0, 5].set(1e6)))
    differs = np.asarray(spoiled != back)
    assert differs[0, :128].any()
    assert not differs[0, 128:].any()
    assert not differs[1:].any()


def test_dequantizing_what_was_quantized_with_powers_of_two_is_exact_the_second_time():
    x = jnp.asarray(rows_of_all_magnitudes())
    once = reference.dequantize_rows(*quantize_rows(x, True))
    np.testing.assert_array_equal(reference.dequantize_rows(*quantize_rows(once, True)), once)


def test_requantizing_between_powers_of_two_is_exact_but_for_subnormals():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((256, 128)) * 2.0 ** (np.arange(256)[:, None] % 7))
    stored = quantize_rows(x.astype(jnp.float32), True)
    before = np.asarray(reference.dequantize_rows(*stored))
    moved = requantize_columns(*stored, True)
    assert moved.q.shape == (128, 256)
    assert moved.scale.shape == (2, 128)
    after = np.asarray(reference.dequantize_rows(*moved)).T
    normal = np.abs(before) >= 2.0**-6 * np.repeat(np.asarray(moved.scale), 128, axis=0)
    assert normal.mean() > 0.5
    np.testing.assert_array_equal(after[normal], before[normal])
    unequal = requantize_columns(*quantize_rows(x.astype(jnp.float32)))
    again = quantize_columns(reference.dequantize_rows(*quantize_rows(x.astype(jnp.float32))))
    same(unequal.q, again.q)
    same(unequal.scale, again.scale)
