"""The kernels' division in exact arithmetic: its rounding for all significands, its codes next to every boundary."""

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantize import division
from pallas_kernels.quantize.reference import E4M3_MAX

STEP = np.float32(2.0**-23)


class Exact:
    """Float32 operations, each rounded once."""

    def constant(self, value, like):
        return np.full_like(like, value)

    def multiply(self, a, b):
        return a * b

    def negative(self, a):
        return -a

    def fma(self, a, b, c):
        product, c = a.astype(np.float64) * b, c.astype(np.float64)  # 48 bits fit in 53
        total = product + c
        virtual = total - product
        error = (product - (total - virtual)) + (c - virtual)
        # An inexact sum is moved to the neighbour with an odd last bit, so that rounding it again is not felt.
        even = (total.view(np.int64) & 1) == 0
        toward = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where((error != 0) & even, toward, total).astype(np.float32)


def true_quotient(x, s):
    return (x.astype(np.float64) / s).astype(np.float32)


def test_the_exact_fma_rounds_once():
    # In float64 the sum is a tie of float32, and its last bit is lost.
    a, b, c = np.float32(1 + 2.0**-12), np.float32(1 + 2.0**-12), np.float32(2.0**-60)
    assert Exact().fma(*(np.full(1, v) for v in (a, b, c)))[0] == np.float32(1 + 2.0**-11 + 2.0**-23)
    assert Exact().fma(*(np.full(1, v) for v in (a, b, -c)))[0] == np.float32(1 + 2.0**-11)


def test_scales_are_correctly_rounded_for_every_significand():
    for first in range(0, 1 << 23, 1 << 16):
        amax = (np.arange(first, first + (1 << 16), dtype=np.uint32) | np.uint32(0x3F800000)).view(np.float32)
        np.testing.assert_array_equal(division.scale_quotient(Exact(), amax), true_quotient(amax, np.float32(E4M3_MAX)))


def test_codes_are_right_for_every_bfloat16_and_a_zero_keeps_its_sign():
    x = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    random = np.random.default_rng(0).random(8, np.float32) * np.exp2(np.linspace(-18, 100, 8)).astype(np.float32)
    for s in np.concatenate([np.float32([1e-4 / 448, 2.0**-22, 1, 1.5, 4, 7e35]), random]):
        given = x[np.abs(x) <= 448 * s]  # not NaN
        s = np.full_like(given, s)
        got = division.corrected_quotient(Exact(), given, s, true_quotient(np.ones_like(s), s))
        codes, true = (q.astype(ml_dtypes.float8_e4m3fn).view(np.uint8) for q in (got, true_quotient(given, s)))
        np.testing.assert_array_equal(codes, true)
        assert {0, 128} <= set(true[given == 0])


@pytest.mark.parametrize("sixteenths", range(16, 32))
def test_quotients_lie_on_the_right_side_of_every_boundary_between_codes(sixteenths):
    boundary = np.float32(sixteenths / 16)
    near_one = np.arange(64, dtype=np.float32) * STEP
    random = 1 + np.random.default_rng(sixteenths).random(1 << 14, np.float32)
    s = np.concatenate([1 + near_one, 2 - STEP - near_one, random])
    r = true_quotient(np.ones_like(s), s)
    middle = (s.astype(np.float64) * (np.float64(boundary) + 2.0**-24)).astype(np.float32)
    for units in range(-3, 4):
        x = (middle.view(np.int32) + np.int32(units)).view(np.float32)
        got, true = division.corrected_quotient(Exact(), x, s, r), true_quotient(x, s)
        np.testing.assert_array_equal(np.sign(got - boundary), np.sign(true - boundary))


@pytest.mark.parametrize("bits", [7, 10], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("units_below", range(1, 5))
def test_quotients_of_16_bit_values_are_true_for_every_largest_magnitude(bits, units_below):
    ops, significands = Exact(), (1 + np.arange(1 << bits) / (1 << bits)).astype(np.float32)
    # The quotient of two numbers does not depend on their exponents; only tiles near zero have another scale.
    x = np.concatenate([significands, significands / 2])[None]
    s = division.scale_quotient(ops, significands)[:, None]
    floor = true_quotient(np.float32([1e-4]), np.float32(E4M3_MAX))[:, None]
    for given, scale in ((x, s), (x * np.float32(2.0**-14), floor)):
        r = (true_quotient(np.ones_like(scale), scale).view(np.int32) - np.int32(units_below)).view(np.float32)
        rest = division.rest_of_reciprocal(ops, scale, r)
        assert (rest > 0).all()
        got, true = division.quotient_of_16_bits(ops, given, r, rest), true_quotient(given, scale)
        possible = np.broadcast_to(given <= np.float64(scale) * 449, got.shape)
        np.testing.assert_array_equal(got[possible], true[possible])
        zeros = division.quotient_of_16_bits(ops, np.float32([0.0, -0.0])[None], r, rest)
        np.testing.assert_array_equal(np.signbit(zeros), np.broadcast_to([False, True], zeros.shape))
