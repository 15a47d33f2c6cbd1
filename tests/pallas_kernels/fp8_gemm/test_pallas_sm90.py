"""The dense Hopper kernels: in the interpreter with its race detector, lowered for Hopper, and (-m gpu) on a GPU."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.fp8_gemm import bench, cases, fp8_gemm, fp8_wgrad, measure, pallas_sm90, reference, tiles, timing
from pallas_kernels.fp8_gemm.product_sm90 import Tiling
from pallas_kernels.testing import assert_close, calc_diff

INTERPRET = {
    "sm_count": 2,
    # The interpreter models the fence that stands between reading scales and overwriting them under this option.
    "interpret": plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="_hack_model_inline_mgpu_tokamax"),
}
NARROW = Tiling(block_n=96, stages=2, unroll=2, fenced=True)
PAIRED = Tiling(block_n=64, warpgroups=1, stages=2, unroll=1, cluster=2, fenced=True)
BESIDE = Tiling(block_n=32, warpgroups=1, stages=3, unroll=2, cluster=2, share="a", fenced=True)


def operands_of(case, seed=0):
    return bench.work(case).make(jax.random.key(seed))


@pytest.mark.parametrize(
    ("tiling", "shape"),
    [
        (PAIRED, (72, 96, 256)),
        pytest.param(BESIDE, (64, 96, 384), marks=pytest.mark.slow),
        pytest.param(NARROW, (136, 160, 384), marks=pytest.mark.slow),
    ],
    ids=["paired", "beside", "narrow"],
)
def test_products_in_the_interpreter_equal_the_definition_without_a_race(tiling, shape):
    operands = operands_of(cases.Case("gemm", *shape))
    y = jax.block_until_ready(pallas_sm90.gemm(*operands, dtype=jnp.float32, tiling=tiling, **INTERPRET))
    assert not gpu_callbacks.get_races().races_found
    assert_close(y, reference.fp8_gemm(*operands))


@pytest.mark.slow
def test_without_the_fence_the_only_race_found_is_the_scales_overwritten_after_their_read(capfd):
    """The read is over long before the copy: it precedes the product whose end hands the stage back."""
    operands = operands_of(cases.Case("gemm", 64, 64, 384))
    tiling = dataclasses.replace(PAIRED, cluster=1, fenced=False)
    y = jax.block_until_ready(pallas_sm90.gemm(*operands, dtype=jnp.float32, tiling=tiling, **INTERPRET))
    assert_close(y, reference.fp8_gemm(*operands))
    accesses = [line for line in capfd.readouterr().out.splitlines() if " of HostAllocationKey" in line]
    assert accesses
    assert all("slice(0, 64, 1)" in line and "128" not in line.split("from")[0] for line in accesses)


@pytest.mark.slow  # the grouped weight gradient's test runs the same code
def test_a_weight_gradient_in_the_interpreter_equals_the_definition_without_a_race():
    operands = operands_of(cases.Case("wgrad", 384, 40, 72))
    tiling = Tiling(block_n=64, warpgroups=1, stages=2, unroll=2, fenced=True)
    dw = jax.block_until_ready(pallas_sm90.wgrad(*operands, tiling=tiling, **INTERPRET))
    assert not gpu_callbacks.get_races().races_found
    assert_close(dw, reference.fp8_wgrad(*operands))


BY_DEFAULT = {bench.work(case).default.name(case.operation == "wgrad"): case for case in cases.BENCHED}
OF_EACH_KIND = (cases.DENSE[-1], cases.WGRAD[0], cases.ODD[1], cases.ODD[2])


@pytest.mark.parametrize(
    "case",
    [
        *OF_EACH_KIND,
        *(pytest.param(case, marks=pytest.mark.slow) for case in BY_DEFAULT.values() if case not in OF_EACH_KIND),
    ],
    ids=lambda case: case.name,
)
def test_every_default_lowers_for_hopper_at_a_benched_shape(case):
    work = bench.work(case)
    operands = jax.eval_shape(work.make, jax.random.key(0))
    into = None if work.into is None else jax.eval_shape(work.into)
    kernel = jax.jit(functools.partial(work.kernel, work.default), donate_argnums=1)
    text = kernel.trace(operands, into).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert ("output_operand_alias<" in text) == (into is not None)


def test_the_public_functions_lower_to_the_kernels_inside_shard_map(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, scales, whole = jax.P("data"), jax.P(None, "data"), jax.P()
    product = jax.shard_map(fp8_gemm, mesh=mesh, in_specs=(rows, scales, whole, whole), out_specs=rows)
    gradient = jax.shard_map(
        lambda x, sx, dy, sdy: jax.lax.psum(fp8_wgrad(x, sx, dy, sdy), "data"),
        mesh=mesh,
        in_specs=(scales, rows, scales, rows),
        out_specs=whole,
    )
    for function, case in ((product, cases.Case("gemm", 128, 576, 256)), (gradient, cases.Case("wgrad", 256, 64, 96))):
        lowered = jax.jit(function).trace(*operands_of(case)).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 16, 200), "the contraction must be a multiple of 128, got 200"),
        ((12, 16, 128), "the rows must be a multiple of 8, got 12"),
        ((8, 20, 128), "the columns must be a multiple of 8, got 20"),
    ],
)
def test_what_the_kernel_cannot_do_is_named(monkeypatch, shape, message):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    m, n, k = shape
    q, w = jnp.zeros((m, k), jnp.float8_e4m3fn), jnp.zeros((n, k), jnp.float8_e4m3fn)
    blocks = -(-k // 128)
    with pytest.raises(ValueError, match=message):
        fp8_gemm(q, jnp.ones((blocks, m)), w, jnp.ones((1, blocks)), implementation="pallas")


def test_defaults_fill_shared_memory_and_keep_every_sm_reading():
    for case in cases.DENSE:
        tiling = tiles.gemm(case.rows, case.columns, case.dim_k)
        assert tiles.rounds(tiling, 1, case.rows, case.columns) * dispatch.HOPPER_SM_COUNT >= 100
        down, across = tiling.grid(case.rows, case.columns)
        assert down * across * tiling.cluster >= 100
        assert tiling.stages >= 4


def test_the_tiling_is_that_with_the_least_cost_of_the_busiest_sm():
    wide, narrow = Tiling(block_n=192), Tiling(block_n=128)
    assert tiles.rounds(narrow, 1, 4096, 2112) == 5  # 32 x 17 tiles on 132 SMs
    assert tiles.rounds(wide, 1, 4096, 2112) == 3
    assert tiles.tile_columns(wide, 2, 64, 192) == 192
    assert tiles.cheapest(((narrow, 1.0), (wide, 1.1)), 1, 4096, 2112) == wide  # 640 against 3 * 192 * 1.1
    assert tiles.cheapest(((narrow, 1.0), (wide, 1.2)), 1, 4096, 2112) == narrow


def test_the_sustained_loop_makes_every_call_of_every_turn():
    sets = [(jnp.full((4, 4), float(i)),) for i in range(3)]
    outs = [jnp.zeros((4, 4)) for _ in sets]
    looped, calls = timing.loop(lambda operands, out: out + operands[0], sets, outs, True, 1000.0)
    assert calls == 3 * 3  # 10 ms at 1.2 ms a call, three to a turn
    for i, out in enumerate(looped(sets, outs)):
        np.testing.assert_array_equal(out, 3.0 * i)


def test_spills_are_read_from_the_report_of_ptxas():
    report = (
        "ptxas info    : Function properties for fp8_n128w2s5u4o2_n8c1_mosaic_gpu_kernel\n"
        "    48 bytes stack frame, 48 bytes spill stores, 80 bytes spill loads\n"
        "ptxas info    : Function properties for fp8_n96\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    )
    assert measure.spilled_bytes(report) == {"fp8_n128w2s5u4o2_n8c1": 128, "fp8_n96": 0}


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*cases.BENCHED, *cases.ODD], ids=lambda case: case.name)
def test_results_on_hopper_agree_with_the_definition_with_outliers_and_zero_tiles(case):
    work = bench.work(case)
    a, a_scale, b, b_scale = jax.jit(work.make)(jax.random.key(1))
    a = a.at[0, :128].set(448).at[1, :128].set(0).at[2, :128].set(2.0**-9).at[3, -128:].set(-448)
    a_scale = a_scale.at[0, 0].multiply(1000).at[-1, 3].multiply(300)
    operands = (a, a_scale, b, b_scale)
    kernel = jax.jit(functools.partial(work.kernel, work.default))
    expected = jax.jit(work.reference, compiler_options={"xla_gpu_autotune_level": 0})(*operands)
    if work.into is not None:
        expected = expected + work.into()
    got = kernel(operands, None if work.into is None else work.into())
    assert got.shape == expected.shape
    assert measure.device_calc_diff(got, expected) < (1e-6 if work.into else 1e-5)
    for row in range(4):
        assert calc_diff(got[row], expected[row]) < 1e-4
    again = kernel(operands, None if work.into is None else work.into())
    np.testing.assert_array_equal(jax.device_get(got != again).any(), False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [cases.ODD[1], cases.ODD[3]], ids=lambda case: case.name)
def test_every_kind_of_tiling_gives_the_same_bits_on_hopper(case):
    operands = jax.jit(bench.work(case).make)(jax.random.key(2))
    expected = pallas_sm90.gemm(*operands, tiling=Tiling(unroll=1))
    for tiling in (
        Tiling(unroll=2, stages=5, cluster=2),
        Tiling(unroll=2, cluster=2, share="a"),
        Tiling(block_n=96, unroll=4, stages=5),
        Tiling(block_n=176, unroll=1),
        Tiling(block_n=32, warpgroups=1, unroll=4, stages=8),
        Tiling(warpgroups=3, unroll=1, fenced=True),
    ):
        got = pallas_sm90.gemm(*operands, tiling=tiling)
        assert int((got != expected).sum()) == 0, tiling


@pytest.mark.gpu
def test_the_public_function_takes_the_kernel_on_hopper():
    operands = jax.jit(bench.work(cases.ODD[1]).make)(jax.random.key(0))
    assert "mosaic_gpu" in jax.jit(fp8_gemm).lower(*operands).as_text()
    assert calc_diff(fp8_gemm(*operands), fp8_gemm(*operands, implementation="xla")) < 1e-5


@pytest.mark.gpu
def test_no_default_spills_registers():
    program = (
        "import jax\n"
        "from pallas_kernels.fp8_gemm import bench, cases\n"
        "seen = set()\n"
        "for case in cases.BENCHED:\n"
        "    work = bench.work(case)\n"
        "    if (name := work.default.name(work.column_scales)) not in seen:\n"
        "        seen.add(name)\n"
        "        into = None if work.into is None else work.into()\n"
        "        operands = jax.jit(work.make)(jax.random.key(0))\n"
        "        jax.block_until_ready(jax.jit(work.kernel, static_argnums=0)(work.default, operands, into))\n"
        "print('kernels', *seen)\n"
    )
    environment = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    (names,) = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("kernels"))
    spilled = measure.spilled_bytes(done.stdout + done.stderr)
    assert set(names) <= set(spilled), done.stdout + done.stderr
    assert all(spilled[name] == 0 for name in names), spilled
