"""The Hopper kernels: in the interpreter with its race detector, lowered for Hopper, and (-m gpu) on the device."""

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
from pallas_kernels.grouped_gemm import grouped_gemm, pallas_sm90, reference, xla
from pallas_kernels.grouped_gemm.cases import BENCHED, Case
from pallas_kernels.grouped_gemm.pallas_sm90 import Tiling
from pallas_kernels.testing import assert_close

UNEVEN = Case("uneven", (0, 130), 128, 256, 128)
SHARED = Tiling(tile_n=128, stages=2)
IN_TURN = Tiling(tile_n=128, stages=3, ping_pong=True)
TILINGS = (SHARED, IN_TURN, Tiling(tile_n=256, stages=3, minor=0, width=2))


def all_three(x, w, dy, groups, used, *, case, gemm, wgrad):
    common = {"block": case.block}
    return (
        gemm(x, w, groups, used, transpose_w=False, **common),
        gemm(dy, w, groups, used, transpose_w=True, **common),
        wgrad(x, dy, groups, used, num_groups=case.num_groups, **common),
    )


def arrays_of(case, dtype=jnp.bfloat16):
    x, w, dy = (jnp.asarray(a, dtype) for a in case.arrays())
    return x, w, dy, jnp.asarray(case.group_of_block()), jnp.int32(case.used_blocks)


def check_against_definition(results, case):
    y, dx, dw = results
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    x, w, dy, groups, _ = arrays_of(case)
    op = functools.partial(reference.grouped_gemm, group_of_block=groups, block=case.block)
    wide = [a.astype(jnp.float32) for a in (x, w, dy)]
    expected_y, back = jax.vjp(lambda x, w: op(x, w), *wide[:2])
    expected_dx, expected_dw = back(wide[2])
    assert_close(y, expected_y)
    assert_close(dx, expected_dx)
    assert_close(dw, expected_dw, tolerance=1e-5)
    spare = case.used_blocks * case.block
    np.testing.assert_array_equal(np.asarray(y[spare:], np.float32), 0.0)
    np.testing.assert_array_equal(np.asarray(dx[spare:], np.float32), 0.0)
    for group, rows in enumerate(case.rows_of_group):
        assert np.any(dw[group]) == (rows > 0)


@pytest.mark.parametrize("tiling", [SHARED, IN_TURN], ids=["shared", "in_turn"])
def test_results_in_the_interpreter_equal_the_definition_without_a_race(tiling):
    assert UNEVEN.used_blocks < UNEVEN.num_blocks

    def raceless(kernel):
        options = {"tiling": tiling, "sm_count": 2, "interpret": plgpu.InterpretGPUParams(detect_races=True)}

        def run(*arguments, **keywords):
            result = jax.block_until_ready(kernel(*arguments, **keywords, **options))
            assert not gpu_callbacks.get_races().races_found
            return result

        return run

    kernels = {"gemm": raceless(pallas_sm90.gemm), "wgrad": raceless(pallas_sm90.wgrad)}
    check_against_definition(all_three(*arrays_of(UNEVEN), case=UNEVEN, **kernels), UNEVEN)


def test_the_kernels_lower_for_hopper_and_fit_in_its_shared_memory():
    case = BENCHED[0]
    blocks, rows = case.num_blocks, case.num_blocks * case.block
    shapes = [(rows, case.dim_k), (case.num_groups, case.dim_k, case.dim_n), (rows, case.dim_n)]
    avals = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    avals += [jax.ShapeDtypeStruct((blocks,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)]
    kernels = functools.partial(all_three, case=case, gemm=pallas_sm90.gemm, wgrad=pallas_sm90.wgrad)
    text = jax.jit(kernels).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3
    too_large = functools.partial(kernels, gemm=functools.partial(pallas_sm90.gemm, tiling=Tiling(stages=5)))
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        jax.jit(too_large).trace(*avals).lower(lowering_platforms=("cuda",))


def test_the_public_function_lowers_to_the_kernels_inside_shard_map_with_checked_replication(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")

    def local(x, w, dy, groups):
        op = functools.partial(grouped_gemm, group_of_block=groups, block=128, implementation="pallas")
        y, back = jax.vjp(lambda x, w: op(x, w), x, jax.lax.pcast(w, "data", to="varying"))
        dx, dw = back(dy)
        return y, dx, jax.lax.psum(dw, "data")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec, jax.P(), spec, spec), out_specs=(spec, spec, jax.P()))
    x, w, dy, groups, _ = arrays_of(UNEVEN)
    lowered = jax.jit(sharded).trace(x, w.astype(jnp.float32), dy, groups).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 3


@pytest.mark.parametrize(
    ("dtype", "block", "dims", "message"),
    [
        (jnp.float32, 128, (128, 128), "x_MK must be bfloat16 or float16, got float32"),
        (jnp.bfloat16, 64, (128, 128), "block must be a multiple of 128, got 64"),
        (jnp.bfloat16, 128, (128, 192), r"K and N must be multiples of 128, got \(128, 192\)"),
    ],
)
def test_what_the_kernel_cannot_do_is_named(monkeypatch, dtype, block, dims, message):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    x, w = jnp.zeros((2 * block, dims[0]), dtype), jnp.zeros((1, *dims), dtype)
    with pytest.raises(ValueError, match=message):
        grouped_gemm(x, w, jnp.zeros(2, jnp.int32), block=block, implementation="pallas")


LARGE = Case("large", (700, 0, 1, 2050, 128, 1153, 0), 768, 1536, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", [None, *TILINGS], ids=str)
@pytest.mark.parametrize("case", [UNEVEN, LARGE], ids=lambda case: case.name)
def test_results_on_hopper_equal_the_definition(case, tiling):
    if tiling and case.dim_k % tiling.tile_n:
        with pytest.raises(ValueError, match="tile_n = 256 does not divide the 128 columns"):
            pallas_sm90.gemm(*(arrays_of(case)[i] for i in (2, 1, 3, 4)), block=128, transpose_w=True, tiling=tiling)
        return
    gemm, wgrad = (functools.partial(kernel, tiling=tiling) for kernel in (pallas_sm90.gemm, pallas_sm90.wgrad))
    kernels = jax.jit(functools.partial(all_three, case=case, gemm=gemm, wgrad=wgrad))
    check_against_definition(kernels(*arrays_of(case)), case)


@pytest.mark.gpu
def test_the_public_function_takes_the_kernel_on_hopper_and_agrees_with_xla():
    x, w, dy, groups, used = arrays_of(LARGE)
    master = w.astype(jnp.float32)

    def product_and_gradients(x, w, dy, implementation):
        op = functools.partial(grouped_gemm, block=LARGE.block, num_blocks=used, implementation=implementation)
        y, back = jax.vjp(lambda x, w: op(x, w, groups), x, w)
        return (y, *back(dy))

    run = jax.jit(product_and_gradients, static_argnums=3)
    assert "mosaic_gpu" in run.lower(x, master, dy, "auto").as_text()
    results, expected = run(x, master, dy, "auto"), run(x, master, dy, "xla")
    assert results[2].dtype == jnp.float32
    for got, wanted in zip(results, expected, strict=True):
        assert_close(got, wanted, tolerance=1e-5 if got.dtype == jnp.float32 else None)


@pytest.mark.gpu
@pytest.mark.parametrize("case", BENCHED, ids=lambda case: case.name)
def test_results_at_the_benched_shapes_agree_with_xla(case):
    keys = jax.random.split(jax.random.key(0), 3)
    mask = jnp.asarray(case.row_mask())[:, None]
    x = jnp.where(mask, jax.random.normal(keys[0], (mask.shape[0], case.dim_k), jnp.bfloat16), 0)
    dy = jnp.where(mask, jax.random.normal(keys[1], (mask.shape[0], case.dim_n), jnp.bfloat16), 0)
    w = jax.random.normal(keys[2], (case.num_groups, case.dim_k, case.dim_n), jnp.bfloat16)
    groups, used = jnp.asarray(case.group_of_block()), jnp.int32(case.used_blocks)

    def worst(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    for transpose_w, rows in ((False, x), (True, dy)):
        got = jax.jit(pallas_sm90.gemm, static_argnames=("block", "transpose_w"))
        expected = jax.jit(xla.gemm, static_argnames=("block", "transpose_w"))
        options = {"block": case.block, "transpose_w": transpose_w}
        assert worst(got(rows, w, groups, used, **options), expected(rows, w, groups, **options)) < 8e-3
    got = jax.jit(pallas_sm90.wgrad, static_argnames=("block", "num_groups"))
    expected = jax.jit(xla.wgrad, static_argnames=("block", "num_groups"))
    options = {"block": case.block, "num_groups": case.num_groups}
    assert worst(got(x, dy, groups, used, **options), expected(x, dy, groups, **options)) < 1e-5


@pytest.mark.gpu
def test_no_kernel_spills_registers():
    program = (
        "import jax, jax.numpy as jnp\n"
        "from pallas_kernels.grouped_gemm import pallas_sm90 as p\n"
        "x, w, dy = (jnp.zeros(s, jnp.bfloat16) for s in ((256, 512), (2, 512, 256), (256, 256)))\n"
        "groups, used = jnp.arange(2, dtype=jnp.int32), jnp.int32(2)\n"
        "for t in (p.Tiling(tile_n=128), p.Tiling(tile_n=256), p.Tiling(tile_n=128, ping_pong=True)):\n"
        "    for rows, transposed in ((x, False), (dy, True)):\n"
        "        jax.block_until_ready(p.gemm(rows, w, groups, used, block=128, transpose_w=transposed, tiling=t))\n"
        "    jax.block_until_ready(p.wgrad(x, dy, groups, used, block=128, num_groups=2, tiling=t))\n"
    )
    environment = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    report = [line for line in (done.stdout + done.stderr).splitlines() if "spill" in line]
    assert len(report) >= 9, done.stdout + done.stderr
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in report), "\n".join(report)
