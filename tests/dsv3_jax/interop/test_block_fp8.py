"""Weights in FP8 blocks on the host: the reference quantizer's bits, and what its values multiply back to."""

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.interop.block_fp8 import BLOCK, dequantize, quantize, scale_rows
from pallas_kernels.quantize import reference

F32, BF16, E4M3 = (np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn))


def _normal(rng, shape):
    return rng.standard_normal(shape).astype(np.float32)


def _outliers(rng, shape):
    x = _normal(rng, shape)
    x.flat[:: x.size // 7] *= 1e4
    return x


def _every_magnitude(rng, shape):
    """From float32's denormals to near its end, each block with magnitudes of its own."""
    exponents = rng.integers(-148, 127, shape)
    return np.ldexp(rng.uniform(1, 2, shape), exponents).astype(np.float32) * rng.choice([-1, 1], shape)


def _ties(rng, shape):
    """Halfway between neighbours of e4m3 after division by the scale, which is 1 here."""
    grid = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    grid = np.sort(grid[np.isfinite(grid)])
    x = rng.choice((grid[1:] + grid[:-1]) / 2, shape).astype(np.float32)
    x[::BLOCK, ::BLOCK] = 448
    return x


RAGGED = (300, 140)
MATRICES = {
    "normal": (_normal, (256, 128)),
    "ragged edges": (_normal, RAGGED),
    "smaller than a block": (_normal, (5, 3)),
    "zeros": (lambda rng, shape: np.zeros(shape, np.float32), RAGGED),
    "a block of zeros": (lambda rng, shape: _normal(rng, shape) * (np.arange(shape[1]) >= BLOCK), RAGGED),
    "denormal": (lambda rng, shape: _normal(rng, shape) * np.float32(1e-40), RAGGED),
    "below the floor of the scale": (lambda rng, shape: _normal(rng, shape) * np.float32(1e-6), RAGGED),
    "outliers": (_outliers, RAGGED),
    "every magnitude": (_every_magnitude, RAGGED),
    "ties": (_ties, RAGGED),
    "weights of a model": (lambda rng, shape: 0.006 * _normal(rng, shape), RAGGED),
}
"""Few shapes: each compiles a reference of its own."""

quantize_blocks = jax.jit(reference.quantize_blocks, static_argnames="power_of_two")


def drawn(case, dtype=F32):
    make, shape = MATRICES[case]
    return make(np.random.default_rng(3), shape).astype(dtype)


def same_bits(left, right):
    left, right = np.asarray(left), np.asarray(right)
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left.view(f"u{left.itemsize}"), right.view(f"u{right.itemsize}"))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", MATRICES)
def test_values_and_scales_are_the_reference_quantizers(case, dtype):
    x = drawn(case, dtype)
    values, scale = quantize(x)
    wanted = quantize_blocks(x, power_of_two=False)
    same_bits(scale, wanted.scale)
    same_bits(values, wanted.q)


def test_every_quotient_is_rounded_once():
    x = drawn("normal")
    _, scale = quantize(x)
    spread = np.repeat(np.repeat(scale, BLOCK, 0), BLOCK, 1)
    exact = (x.astype(np.float64) / spread.astype(np.float64)).astype(np.float32).astype(E4M3)
    same_bits(quantize(x)[0], exact)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(256, 128), RAGGED, (5, 3)])
def test_dequantization_is_one_product_in_float32_for_every_value(shape, dtype):
    rng = np.random.default_rng(0)
    finite = [byte for byte in range(256) if byte & 0x7F != 0x7F]
    values = rng.choice(np.array(finite, np.uint8), shape).view(E4M3)
    blocks = [-(-size // BLOCK) for size in shape]
    scale = np.ldexp(rng.uniform(1, 2, blocks), rng.integers(-30, 30, blocks)).astype(np.float32)
    spread = np.repeat(np.repeat(scale, BLOCK, 0), BLOCK, 1)[: shape[0], : shape[1]]
    same_bits(dequantize(values, scale, dtype), (values.astype(np.float32) * spread).astype(dtype))


@pytest.mark.parametrize("case", MATRICES)
def test_what_comes_back_is_within_half_a_step_of_the_format(case):
    x = drawn(case)
    values, scale = quantize(x)
    spread = np.repeat(np.repeat(scale, BLOCK, 0), BLOCK, 1)[: x.shape[0], : x.shape[1]].astype(np.float64)
    error = np.abs(dequantize(values, scale, F32).astype(np.float64) - x)
    # Three bits of mantissa: 2^-4 of a normal value (spec 28, item 23), 2^-10 of the scale below those.
    assert (error <= np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * spread) * (1 + 1e-6)).all()


@pytest.mark.parametrize("case", ["ragged edges", "outliers", "weights of a model"])
def test_slices_of_whole_blocks_of_rows_are_the_whole(case):
    x = drawn(case)
    values, scale = quantize(x)
    for start, stop in [(0, BLOCK), (BLOCK, x.shape[0]), (0, x.shape[0] - 1)]:
        part, part_scale = quantize(x[start:stop])
        first, last = scale_rows(start, stop)
        if stop % BLOCK == 0 or stop == x.shape[0]:
            same_bits(part_scale, scale[first:last])
            same_bits(part, values[start:stop])
        same_bits(dequantize(values[start:stop], scale[first:last], F32), dequantize(values, scale, F32)[start:stop])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_is_not_finite_is_refused(bad, dtype):
    x = drawn("ragged edges", dtype)
    x[299, 139] = bad
    with pytest.raises(ValueError, match="infinite or not a number"):
        quantize(x)
