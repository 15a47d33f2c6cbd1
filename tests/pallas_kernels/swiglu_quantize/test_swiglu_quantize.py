"""SwiGLU with quantized output: the definition, its backward from FP8 inputs, and the Hopper kernel."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.mosaic.gpu import core
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.quantize import dequantize_rows, quantize_columns, quantize_rows
from pallas_kernels.quantize.tile_loop import Tiling
from pallas_kernels.swiglu_quantize import (
    backward_sm90,
    cases,
    pallas_sm90,
    reference,
    swiglu_backward,
    swiglu_backward_quantize,
    swiglu_quantize,
    swiglu_with_gradient,
)
from pallas_kernels.testing import assert_close


def plain(gate_up):
    gate, up = jnp.split(gate_up, 2, axis=1)
    return gate / (1 + jnp.exp(-gate)) * up


def check_tiles_nearly_equal(tiles, wanted):
    """Equal but where another exponential rounded the result otherwise: rarely, and then to a neighbour."""
    assert_close(tiles.scale, wanted.scale, tolerance=1e-3)
    codes, wanted_codes = (np.asarray(t.q).view(np.uint8).astype(int) for t in (tiles, wanted))
    codes, wanted_codes = (np.where(each == 128, 0, each) for each in (codes, wanted_codes))  # two zeros
    assert np.abs(codes - wanted_codes).max() <= 1
    assert (codes != wanted_codes).mean() < 2e-3


def check_gradients_nearly_equal(got, expected):
    for tiles, wanted in zip(got[:3], expected[:3], strict=True):
        check_tiles_nearly_equal(tiles, wanted)
    if expected.dweight_M is not None:
        assert_close(got.dweight_M, expected.dweight_M, tolerance=1e-5)


def weights_of(rows, weighted):
    """Positive numbers of different size, some of them zero."""
    if not weighted:
        return None
    rng = np.random.default_rng(7)
    return jnp.asarray(rng.uniform(0, 2, rows) * (rng.random(rows) > 0.1), jnp.float32)


def check_nearly_equal(got, expected):
    """The output's tiles nearly, those of the input exactly."""
    check_tiles_nearly_equal(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_multiply_the_output_and_get_a_gradient():
    gate_up, dout = (jnp.asarray(cases.SMALL[0].array(seed)[:, :size]) for seed, size in ((0, 512), (1, 256)))
    weight = weights_of(128, True)

    @jax.jit
    def run(gate_up, dout, weight):
        stored = quantize_rows(gate_up)
        out, back = jax.vjp(lambda x, w: plain(x) * w[:, None], dequantize_rows(*stored), weight)
        dgate_up, dweight = back(dout)
        found = swiglu_backward_quantize(stored, dout, weight)
        return found, (quantize_rows(dgate_up), quantize_columns(dgate_up), quantize_columns(out), dweight)

    found, expected = run(gate_up, dout, weight)
    check_gradients_nearly_equal(found, reference.SwigluGradients(*expected))


@pytest.mark.parametrize("case", cases.EDGES, ids=lambda case: case.name)
def test_the_backward_is_that_of_the_dequantized_inputs(case):
    gate_up = jnp.asarray(case.array())
    dout = jnp.asarray(np.random.default_rng(1).standard_normal((case.shape[0], case.shape[1] // 2)), jnp.float32)

    @jax.jit
    def run(gate_up, dout):
        out, stored = swiglu_quantize(gate_up)
        kept = dequantize_rows(*stored)
        again, back = jax.vjp(plain, kept)
        (carried,) = jax.vjp(lambda x: swiglu_with_gradient(x)[1], gate_up)[1](dout)
        got = (out, stored, *swiglu_backward(stored, dout), carried)
        return got, (quantize_rows(plain(gate_up)), quantize_rows(gate_up), back(dout)[0], quantize_columns(again))

    (out, stored, dgate_up, columns, carried), (wanted, wanted_stored, wanted_gradient, wanted_columns) = run(
        gate_up, dout
    )
    check_nearly_equal((out, stored), (wanted, wanted_stored))
    assert_close(dgate_up, wanted_gradient, tolerance=1e-5)
    np.testing.assert_array_equal(carried, dgate_up)
    assert columns.q.shape == dout.shape[::-1]
    assert_close(dequantize_rows(*columns), dequantize_rows(*wanted_columns), tolerance=3e-3)


def test_only_the_codes_and_scales_of_the_inputs_are_kept():
    gate_up = jnp.asarray(cases.SMALL[0].array(), jnp.bfloat16)
    back = jax.eval_shape(lambda x: jax.vjp(swiglu_with_gradient, x)[1], gate_up)
    kept = [leaf for leaf in jax.tree.leaves(back) if getattr(leaf, "size", 0) > 1]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) == gate_up.size + 4 * gate_up.size // 128


def test_an_odd_number_of_columns_is_refused():
    with pytest.raises(ValueError, match="must have an even number of columns, got 3"):
        swiglu_quantize(jnp.zeros((2, 3)))


def test_the_kernel_in_the_interpreter_equals_the_definition_without_a_race():
    gate_up = jnp.asarray(cases.SMALL[1].array()[:16], jnp.bfloat16)
    params = plgpu.InterpretGPUParams(detect_races=True)
    got = jax.block_until_ready(pallas_sm90.swiglu_quantize(gate_up, tiling=Tiling(rows=16), interpret=params))
    check_nearly_equal(got, jax.jit(reference.swiglu_quantize)(gate_up))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("weighted", [False, True])
def test_the_backward_kernel_in_the_interpreter_equals_the_definition_without_a_race(weighted):
    stored = jax.jit(quantize_rows)(jnp.asarray(cases.SMALL[1].array(), jnp.bfloat16))
    dout = jnp.asarray(cases.SMALL[1].array(1)[:, :128], jnp.bfloat16)
    weight = weights_of(len(dout), weighted)
    params = plgpu.InterpretGPUParams(detect_races=True)
    kernel = functools.partial(backward_sm90.swiglu_backward_quantize, chunk=32, interpret=params)
    got = jax.block_until_ready(kernel(stored, dout, weight))
    check_gradients_nearly_equal(got, jax.jit(swiglu_backward_quantize)(stored, dout, weight))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("case", cases.BENCHED[:1], ids=lambda case: case.name)
def test_the_kernel_lowers_for_hopper(monkeypatch, case):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    lowered = jax.jit(swiglu_quantize).trace(jax.ShapeDtypeStruct(case.shape, jnp.bfloat16))
    assert "mosaic_gpu" in lowered.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_the_shared_memory_of_two_blocks_of_the_backward_fits_an_sm(monkeypatch, dtype):
    found, size_of = [], core._smem_tree_size
    monkeypatch.setattr(core, "_smem_tree_size", lambda buffers: found.append(size_of(buffers)) or found[-1])
    stored = jax.eval_shape(quantize_rows, jax.ShapeDtypeStruct((128, 256), dtype))
    run = jax.jit(backward_sm90.swiglu_backward_quantize)
    run.trace(stored, jax.ShapeDtypeStruct((128, 128), dtype)).lower(lowering_platforms=("cuda",))
    reserved, unit = 1024, 128  # by the system for each block; a block's own is a multiple
    (size,) = found
    assert 2 * (reserved + size // unit * unit + unit) <= 228 * 1024


def test_what_the_kernel_cannot_do_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    with pytest.raises(ValueError, match="I must be a multiple of 128, got 64"):
        swiglu_quantize(jnp.zeros((128, 128), jnp.bfloat16), implementation="pallas")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "power_of_two"),
    [(case, power_of_two) for power_of_two in (False, True) for case in cases.SMALL]
    + [(case, False) for case in cases.BENCHED],
    ids=lambda given: getattr(given, "name", str(given)),
)
def test_results_on_hopper_equal_the_definition(case, power_of_two):
    if case in cases.SMALL:
        gate_up = jnp.asarray(case.array(), jnp.bfloat16)
    else:
        gate_up = jax.random.normal(jax.random.key(0), case.shape, jnp.bfloat16)
    run = functools.partial(swiglu_quantize, power_of_two=power_of_two)
    got, expected = (jax.jit(functools.partial(run, implementation=name))(gate_up) for name in ("pallas", "xla"))
    check_nearly_equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "weighted", "power_of_two"),
    [(case, *how) for how in itertools.product((False, True), repeat=2) for case in cases.SMALL]
    + [(case, True, False) for case in cases.BENCHED],
    ids=lambda given: getattr(given, "name", str(given)),
)
def test_the_backward_on_hopper_equals_the_definition(case, weighted, power_of_two):
    if case in cases.SMALL:
        gate_up = jnp.asarray(case.array(), jnp.bfloat16)
    else:
        gate_up = jax.random.normal(jax.random.key(0), case.shape, jnp.bfloat16)
    stored = jax.jit(quantize_rows)(gate_up)
    dout = jax.random.normal(jax.random.key(1), (case.shape[0], case.shape[1] // 2), jnp.bfloat16)
    run = functools.partial(swiglu_backward_quantize, power_of_two=power_of_two)
    given = stored, dout, weights_of(len(dout), weighted)
    check_gradients_nearly_equal(
        *(jax.jit(functools.partial(run, implementation=name))(*given) for name in ("pallas", "xla"))
    )
