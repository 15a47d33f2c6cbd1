"""Rows as FP8 bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize import dequantize_rows, quantize_rows
from sharding.expert_parallel.payload import pack, unpack


@jax.jit
def travel(x):
    return unpack(pack(x), x.shape[1], x.dtype)


def rows():
    x = np.random.default_rng(0).standard_normal((9, 300)) * np.logspace(-7, 4, 9)[:, None]
    return jnp.asarray(x.astype(np.float32))


def test_bytes_carry_what_the_quantizer_makes():
    x = rows()
    assert pack(x).shape == (9, 300 + 3)
    assert pack(x).dtype == jnp.uint8
    np.testing.assert_array_equal(travel(x), dequantize_rows(*quantize_rows(x, power_of_two=True)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_second_way_changes_no_value(dtype):
    once = travel(rows().astype(dtype))
    np.testing.assert_array_equal(travel(once), once)
    assert once.dtype == dtype


def test_empty_slots_are_zero_and_a_broken_tile_is_not_hidden():
    x = rows().at[4, 130].set(jnp.inf)
    packed = jnp.concatenate([pack(x), jnp.zeros((2, 303), jnp.uint8)])
    back = unpack(packed, 300, jnp.float32)
    assert not np.any(back[9:])
    assert np.isnan(back[4, 128:256]).all()
    assert np.isfinite(back).sum() == back.size - 128
