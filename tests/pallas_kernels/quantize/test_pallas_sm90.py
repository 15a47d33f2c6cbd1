"""The Hopper kernels: in the interpreter with its race detector, lowered for Hopper, and (-m gpu) on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.quantize import PackedE5M6, cases, e5m6, e5m6_sm90, op, pallas_sm90, reference
from pallas_kernels.quantize.tile_loop import Tiling

OF_ACTIVATIONS = ("quantize_rows", "quantize_columns", "quantize_both")
FULL_SIZE = [case for case in cases.BENCHED if case.name in ("bench_3b", "v3", "bench_3b_up", "bench_3b_down", "v3_up")]
"""Of those with the same columns one; the bench compares the bits of all."""
SPOILED = ("none", "inf", "nan")
RACES = plgpu.InterpretGPUParams(detect_races=True)


def same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype in (np.float32, jnp.bfloat16):
            np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32))  # NaN equals NaN here
        else:
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def raceless(function, *arguments, **keywords):
    result = jax.block_until_ready(function(*arguments, interpret=RACES, **keywords))
    assert not gpu_callbacks.get_races().races_found
    return result


def test_results_in_the_interpreter_equal_the_definition_without_a_race():
    x = jnp.asarray(cases.Case("two_tiles", (256, 128), "spread").array(), jnp.bfloat16)
    stored, columns = jax.jit(reference.quantize_both)(x)
    one_stage = {
        "sm_count": 1,
        "tiling": Tiling(stages=1, blocks_per_sm=1),
    }  # the second tile refills the first's stage
    same(raceless(pallas_sm90.quantize_both, x, **one_stage), (stored, columns))
    again = raceless(pallas_sm90.requantize_columns, *stored, **one_stage)
    same(again, jax.jit(reference.requantize_columns)(*stored))
    w = x.astype(jnp.float32).reshape(2, 128, 128)
    same(raceless(pallas_sm90.quantize_weight, w, **one_stage), jax.jit(reference.quantize_weight)(w))


def test_rows_are_quantized_and_packed_in_one_pass_without_a_race():
    x = jnp.asarray(cases.Case("two_halves", (128, 512), "spread").array(), jnp.bfloat16)
    x = x.at[3, 5].set(jnp.inf).at[7].set(0).at[9].set(-0.0)
    expected = jax.jit(op.quantize_and_pack)(x)
    same(raceless(e5m6_sm90.quantize_and_pack, x), expected)
    again = raceless(e5m6_sm90.unpack_and_quantize_columns, expected[1], dtype=x.dtype)
    same(again, jax.jit(op.unpack_and_quantize_columns, static_argnums=1)(expected[1], x.dtype))


def test_the_kernels_lower_for_hopper_at_the_benched_shapes(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)

    def lower(function, *shapes_and_dtypes):
        avals = [jax.ShapeDtypeStruct(*given) for given in shapes_and_dtypes]
        lowered = jax.jit(function).trace(*avals).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()

    rows, dim_k = cases.ACTIVATIONS[-1].shape
    lower(op.quantize_both, ((rows, dim_k), jnp.bfloat16))
    lower(op.quantize_and_pack, ((rows, dim_k), jnp.bfloat16))
    stored = ((rows, dim_k // 2 * 3), jnp.uint8), ((dim_k // 128, rows), jnp.float32)
    lower(lambda *stored: op.unpack_and_quantize_columns(PackedE5M6(*stored), jnp.bfloat16), *stored)
    lower(op.requantize_columns, ((rows, dim_k), jnp.float8_e4m3fn), ((dim_k // 128, rows), jnp.float32))
    lower(op.quantize_weight, ((2, *cases.WEIGHTS[0].shape), jnp.float32))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((128, 200), jnp.bfloat16, r"the last two dims must be multiples of 128, got \(128, 200\)"),
        ((128, 128), jnp.float32, "the dtype must be bfloat16 or float16, got float32"),
    ],
)
def test_what_the_kernel_cannot_do_is_named(monkeypatch, shape, dtype, message):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    with pytest.raises(ValueError, match=message):
        op.quantize_rows(jnp.zeros(shape, dtype), implementation="pallas")


def spoiled(x, how):
    return x if how == "none" else x.at[3, 5].set(jnp.inf).at[200, 300].set(-jnp.inf if how == "inf" else jnp.nan)


def on_the_cpu(function, *arguments):
    """The definition as this machine's CPU computes it, whatever the accelerator's arithmetic."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(function, static_argnums=len(arguments) - 1)(*jax.device_put(arguments[:-1]), arguments[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("case", cases.ALIGNED, ids=lambda case: case.name)
def test_bits_on_hopper_equal_the_definition_on_the_cpu(case, how, power_of_two):
    host = spoiled(jnp.asarray(case.array()), how)
    x = host.astype(jnp.bfloat16)
    for name in OF_ACTIVATIONS:
        for module in (pallas_sm90, reference):
            got = jax.jit(getattr(module, name), static_argnums=1)(x, power_of_two)
            same(got, on_the_cpu(getattr(reference, name), np.asarray(x), power_of_two))
    stored = jax.tree.map(np.asarray, on_the_cpu(reference.quantize_rows, np.asarray(x), power_of_two))
    for module in (pallas_sm90, reference):
        got = jax.jit(module.requantize_columns, static_argnums=2)(*map(jnp.asarray, stored), power_of_two)
        same(got, on_the_cpu(reference.requantize_columns, *stored, power_of_two))
        for dtype in (jnp.float32, jnp.bfloat16):
            w = host.astype(dtype).reshape(2, 128, -1)
            got = jax.jit(module.quantize_weight, static_argnums=1)(w, power_of_two)
            same(got, on_the_cpu(reference.quantize_weight, np.asarray(w), power_of_two))


@pytest.mark.gpu
@pytest.mark.parametrize("how", SPOILED)
def test_bits_packed_on_hopper_equal_the_definition_on_the_cpu(how):
    x = spoiled(jnp.asarray(cases.Case("spread", (256, 1024), "spread").array()), how).astype(jnp.bfloat16)
    x = x.at[7].set(0).at[9].set(-0.0)

    def columns_again(packed, dtype):
        back = e5m6.unpack_e5m6(packed, dtype)
        return back, reference.quantize_columns(back, True)

    def definition(x, _):
        return reference.quantize_rows(x, True), e5m6.pack_e5m6(x)

    tiles, packed = on_the_cpu(definition, np.asarray(x), 0)
    same(jax.jit(e5m6_sm90.quantize_and_pack)(x), (tiles, packed))
    same(jax.jit(definition)(x, 0), (tiles, packed))
    same(jax.jit(e5m6.unpack_e5m6)(packed), on_the_cpu(lambda stored, _: e5m6.unpack_e5m6(stored), packed, 0))
    for name in ("pallas", "xla"):
        back = functools.partial(op.unpack_and_quantize_columns, implementation=name)
        same(jax.jit(back, static_argnums=1)(packed, x.dtype), on_the_cpu(columns_again, packed, x.dtype))


@pytest.mark.gpu
def test_the_corrected_product_is_the_true_quotient_for_every_bfloat16_and_many_scales():
    significands = np.arange(128, 256, dtype=np.float32) / 128
    tiles = np.concatenate([significands * np.float32(2) ** e for e in range(-16, 1)])  # below the largest of each tile
    rng = np.random.default_rng(0)
    for _ in range(20):
        largest = (2 + 2 * rng.random(2048)).astype(np.float32)
        x = np.resize(tiles, (2048, 17 * 128)).astype(np.float32)
        x[:, ::128] = largest[:, None]
        x = np.minimum(x, largest[:, None])
        x16 = jnp.asarray(x, jnp.bfloat16)
        got = jax.jit(pallas_sm90.quantize_rows)(x16)
        same(got, on_the_cpu(reference.quantize_rows, np.asarray(x16), False))


@pytest.mark.gpu
@pytest.mark.parametrize("case", FULL_SIZE, ids=lambda case: case.name)
def test_bits_at_the_benched_shapes_equal_the_definition(case):
    weights = case in cases.WEIGHTS
    x = jax.random.normal(jax.random.key(0), case.shape, jnp.float32 if weights else jnp.bfloat16)

    def equal(got, expected):
        kinds = {1: jnp.uint8, 4: jnp.uint32}
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        return jnp.stack([jnp.array_equal(*(p.view(kinds[p.dtype.itemsize]) for p in pair)) for pair in pairs]).all()

    for name in ("quantize_weight",) if weights else OF_ACTIVATIONS:
        got, expected = (jax.jit(getattr(module, name))(x) for module in (pallas_sm90, reference))
        assert jax.jit(equal)(got, expected), name
