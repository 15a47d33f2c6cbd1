"""Rows copied by index: in the interpreter with its race detector, lowered for Hopper, and (-m gpu) on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.permute import gather_sm90, make_plan, permute_tiles
from pallas_kernels.quantize import quantize_rows

RACES = plgpu.InterpretGPUParams(detect_races=True)
F8 = jnp.float8_e4m3fn


def draw(tokens, dim, made):
    rng = np.random.default_rng(dim)
    codes = rng.integers(0, 256, (tokens, dim), np.uint8)
    index = rng.integers(0, tokens + 1, made).astype(np.int32)
    index[-1], index[0] = tokens, tokens - 1
    expected = np.concatenate([codes, np.zeros((1, dim), np.uint8)])[index]
    return jax.lax.bitcast_convert_type(codes, F8), jnp.asarray(index), expected


def test_rows_in_the_interpreter_are_those_of_the_index_without_a_race():
    codes, index, expected = draw(5, 256, 16)
    made = jax.block_until_ready(gather_sm90.copy_rows(codes, index, interpret=RACES))
    assert not gpu_callbacks.get_races().races_found
    np.testing.assert_array_equal(np.asarray(made).view(np.uint8), expected)


def test_what_the_kernel_cannot_take_is_said(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    codes, index, _ = draw(5, 256, 16)
    assert gather_sm90.obstacle(codes, index) is None
    assert "float8_e4m3fn" in str(gather_sm90.obstacle(jnp.ones((5, 256)), index))
    assert "multiple of 128 numbers" in str(gather_sm90.obstacle(codes[:, :192], index))
    assert "multiple of 8 indices" in str(gather_sm90.obstacle(codes, index[:9]))


@pytest.mark.parametrize("dim", [2048, 7168, 128])
def test_the_kernel_lowers_for_hopper(monkeypatch, dim):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    shapes = jax.ShapeDtypeStruct((16384, dim), F8), jax.ShapeDtypeStruct((106368,), jnp.int32)
    jax.jit(gather_sm90.copy_rows).trace(*shapes).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 256, 768, 2048, 2304, 7168])
def test_rows_on_hopper_are_those_of_the_index(dim):
    codes, index, expected = draw(1000, dim, 4096)
    made = jax.jit(gather_sm90.copy_rows)(codes, index)
    np.testing.assert_array_equal(np.asarray(made).view(np.uint8), expected)


@pytest.mark.gpu
def test_permuted_tiles_on_hopper_are_xlas():
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(65)[:6] for _ in range(16384)]).astype(np.int32)  # 64 is nobody's
    plan = make_plan(jnp.asarray(chosen), 64, 128)
    tiles = quantize_rows(jax.random.normal(jax.random.key(0), (16384, 2048), jnp.bfloat16), True)
    made, expected = (
        jax.jit(lambda plan, how=how: permute_tiles(tiles, plan, implementation=how))(plan) for how in ("pallas", "xla")
    )
    for a, b in zip(made, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
