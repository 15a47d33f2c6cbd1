"""E5M6 against a table of all its values, and its packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize import PackedE5M6, e5m6

pack_e5m6, unpack_e5m6 = jax.jit(e5m6.pack_e5m6), jax.jit(e5m6.unpack_e5m6)
encode_e5m6, decode_e5m6 = jax.jit(e5m6.encode_e5m6), jax.jit(e5m6.decode_e5m6)


def all_magnitudes():
    """Every finite magnitude in the order of its code."""
    exponent, mantissa = np.divmod(np.arange(31 * 64), 64)
    normal = np.ldexp(1 + mantissa / 64, exponent - 15)
    return np.where(exponent == 0, np.ldexp(mantissa, -20), normal).astype(np.float32)


def test_every_code_decodes_to_its_value_and_back():
    values = all_magnitudes()
    assert values[-1] == 65024
    codes = np.arange(31 * 64, dtype=np.uint32)
    for sign, offset in ((1, 0), (-1, 1 << 11)):
        np.testing.assert_array_equal(decode_e5m6(jnp.asarray(codes + offset)), sign * values)
        np.testing.assert_array_equal(encode_e5m6(jnp.asarray(sign * values)), codes + offset)


def test_values_between_two_codes_go_to_the_nearer_and_ties_to_the_even_one():
    values = all_magnitudes()
    middle = (values[:-1] + values[1:]) / 2
    lower = np.arange(len(middle), dtype=np.uint32)
    np.testing.assert_array_equal(encode_e5m6(jnp.asarray(middle)), lower + lower % 2)
    np.testing.assert_array_equal(encode_e5m6(jnp.asarray(np.nextafter(middle, np.float32(0)))), lower)
    np.testing.assert_array_equal(encode_e5m6(jnp.asarray(np.nextafter(middle, np.float32(1e9)))), lower + 1)


def test_low_bytes_come_in_order_and_high_bits_of_both_halves_share_a_byte():
    x = jnp.array([[1.0, 1.25, -2.0, 0.0]])
    packed, scale = pack_e5m6(x)
    assert float(scale[0, 0]) == 2.0**-14  # of 2 / 65024 = 2 ** -14.99
    codes = [(15 + 14) << 6, (15 + 14) << 6 | 16, (15 + 15) << 6 | 1 << 11, 0]
    high = [codes[0] >> 8 | codes[2] >> 8 << 4, codes[1] >> 8 | codes[3] >> 8 << 4]
    np.testing.assert_array_equal(packed, [[*(code & 255 for code in codes), *high]])


def test_scales_are_the_smallest_powers_of_two_that_hold_their_tile():
    significand = np.float32([1.0, 1.5, 127 / 64, np.nextafter(np.float32(127 / 64), np.float32(2)), 1.999])
    amax = np.ldexp(significand[:, None], np.arange(-13, 127)).astype(np.float32)
    scale = np.asarray(jax.jit(e5m6.scale_e5m6)(amax), np.float64)
    assert (amax <= 65024 * scale).all()
    assert (amax > 65024 * scale / 2).all()
    assert np.isinf(jax.jit(e5m6.scale_e5m6)(jnp.array([np.inf, np.nan]))).all()


def test_storage_takes_twelve_bits_and_its_error_is_that_of_six_mantissa_bits():
    dim_k = 300
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, dim_k)), jnp.bfloat16)
    stored = pack_e5m6(x)
    assert stored.packed.nbytes == 8 * dim_k * 3 // 2
    assert stored.scale.shape == (-(-dim_k // 128), 8)
    np.testing.assert_array_equal(np.frexp(stored.scale)[0], 0.5)
    back = np.asarray(unpack_e5m6(stored))
    assert (np.abs(back - np.asarray(x, np.float32)) <= 2.0**-7 * np.abs(np.asarray(x, np.float32))).all()
    again = pack_e5m6(jnp.asarray(back))
    np.testing.assert_array_equal(again.packed, stored.packed)


def test_zero_and_infinite_tiles():
    x = np.zeros((1, 384), np.float32)
    x[0, [130, 300]] = np.inf, 3e38
    back = np.asarray(unpack_e5m6(pack_e5m6(x)))[0]
    np.testing.assert_array_equal(back[:128], 0.0)
    assert np.isnan(back[128:256]).all()
    assert back[300] == pytest.approx(3e38, rel=2.0**-7)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_one_value_that_is_not_finite_among_many_is_never_lost(bad):
    x = np.random.default_rng(1).standard_normal((256, 384)).astype(np.float32)
    x[200, 300] = bad
    stored = pack_e5m6(jnp.asarray(x, jnp.bfloat16))
    assert np.isinf(stored.scale[2, 200])
    bytes_of_row = np.asarray(stored.packed)[200]
    assert not bytes_of_row[256:384].any()
    assert not (bytes_of_row[384 + 256 - 192 :] >> 4).any()
    np.testing.assert_array_equal(np.argwhere(np.isnan(unpack_e5m6(stored))), [(200, k) for k in range(256, 384)])


def test_an_odd_number_of_columns_is_refused():
    with pytest.raises(ValueError, match="K must be even, got 3"):
        pack_e5m6(jnp.zeros((1, 3)))


def test_the_stored_form_is_a_pytree():
    stored = jax.eval_shape(pack_e5m6, jnp.zeros((4, 128)))
    assert isinstance(stored, PackedE5M6)
