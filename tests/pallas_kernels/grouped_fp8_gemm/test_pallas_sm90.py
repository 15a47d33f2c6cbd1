"""The grouped Hopper kernels: in the interpreter with its race detector, lowered for Hopper, and (-m gpu) on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.fp8_gemm import measure
from pallas_kernels.fp8_gemm.product_sm90 import Tiling
from pallas_kernels.grouped_fp8_gemm import bench, cases, grouped_fp8_gemm, pallas_sm90
from pallas_kernels.testing import assert_close

INTERPRET = {
    "sm_count": 2,
    "interpret": plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="_hack_model_inline_mgpu_tokamax"),
}


def masked_apart(case, operands):
    """The operands with zeros in padding rows, as ``permute`` leaves them, and noise in masked ones."""
    a, a_scale, *rest = operands
    if case.operation == "masked":
        return a, a_scale, *rest
    mask = jnp.asarray(case.row_mask())
    if case.operation == "wgrad":
        b, b_scale, *groups = rest
        zero = jnp.zeros((), a.dtype)
        return jnp.where(mask[None, :], a, zero), a_scale, jnp.where(mask[None, :], b, zero), b_scale, *groups
    return jnp.where(mask[:, None], a, jnp.zeros((), a.dtype)), a_scale, *rest


def operands_of(case, seed=0):
    return masked_apart(case, jax.jit(bench.work(case).make)(jax.random.key(seed)))


@pytest.mark.parametrize(
    ("case", "tiling"),
    [
        pytest.param(
            cases.Case("contiguous", (3, 0, 130), 96, 256, spare=1),
            Tiling(block_n=64, stages=2, unroll=1, fenced=True),
            marks=pytest.mark.slow,
        ),
        (cases.Case("contiguous", (1, 128), 40, 128, spare=1), Tiling(32, 2, 2, 1, cluster=2, share="a", fenced=True)),
        (cases.Case("masked", (0, 66), 16, 256, max_rows=72), Tiling(16, 1, 2, 2, fenced=True)),
        pytest.param(
            cases.Case("masked", (66, 3), 48, 128, max_rows=72),
            Tiling(48, 1, 2, 1, cluster=2, fenced=True),
            marks=pytest.mark.slow,
        ),
        (cases.Case("wgrad", (0, 260, 4), 40, 64, spare=1), Tiling(64, 1, 2, 1, fenced=True)),
    ],
    ids=lambda value: value.name if isinstance(value, cases.Case) else value.name(False),
)
def test_products_in_the_interpreter_equal_the_definition_without_a_race(case, tiling):
    work, operands = bench.work(case), operands_of(case)
    kernels = {"contiguous": pallas_sm90.gemm, "masked": pallas_sm90.masked, "wgrad": pallas_sm90.wgrad}
    options = {"num_groups": case.num_groups} if case.operation == "wgrad" else {"dtype": jnp.float32}
    got = jax.block_until_ready(kernels[case.operation](*operands, tiling=tiling, **options, **INTERPRET))
    assert not gpu_callbacks.get_races().races_found
    assert_close(got, work.reference(*operands))
    if case.operation == "wgrad":
        assert [bool(np.any(dw)) for dw in got] == [rows > 0 for rows in case.rows_of_group]


@pytest.mark.parametrize("case", [cases.CONTIGUOUS[-1], cases.MASKED[-1], cases.WGRAD[-1]], ids=lambda case: case.name)
def test_the_defaults_lower_for_hopper_at_benched_shapes(case):
    work = bench.work(case)
    operands = jax.eval_shape(work.make, jax.random.key(0))
    into = None if work.into is None else jax.eval_shape(work.into)
    kernel = jax.jit(functools.partial(work.kernel, work.default), donate_argnums=1)
    text = kernel.trace(operands, into).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert ("output_operand_alias<" in text) == (into is not None)


def test_what_the_kernels_cannot_do_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    q, w = jnp.zeros((256, 192), jnp.float8_e4m3fn), jnp.zeros((2, 16, 192), jnp.float8_e4m3fn)
    operands = q, jnp.ones((2, 256)), w, jnp.ones((2, 1, 2)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="the contraction must be a multiple of 128, got 192"):
        grouped_fp8_gemm(*operands, implementation="pallas")
    with pytest.raises(ValueError, match="clusters that share A"):
        pallas_sm90.gemm(*operands, jnp.int32(2), tiling=Tiling(cluster=2, share="b"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*cases.BENCHED, *cases.RAGGED], ids=lambda case: case.name)
def test_results_on_hopper_agree_with_the_definition(case):
    work, (a, a_scale, *rest) = bench.work(case), operands_of(case, 1)
    a_scale = a_scale.at[..., 0, 0].multiply(1000)
    if case.operation == "masked":
        unused = jnp.arange(case.max_rows)[None, :] >= jnp.asarray(case.rows_of_group)[:, None]
        a = jnp.where(unused[:, :, None], jnp.float8_e4m3fn(jnp.nan), a)
    operands = (a, a_scale, *rest)
    expected = jax.jit(work.reference, compiler_options={"xla_gpu_autotune_level": 0})(*operands)
    into = None if work.into is None else work.into()
    got = jax.jit(functools.partial(work.kernel, work.default))(operands, into)
    if into is not None:
        expected = expected + into
        for group, rows in enumerate(case.rows_of_group):
            assert rows > 0 or bool(jnp.all(got[group] == into[group]))
    assert measure.device_calc_diff(got, expected) < (1e-6 if work.into else 1e-5)
    if case.operation == "contiguous":
        assert not bool(jnp.any(got[128 * case.used_blocks :]))
    if case.operation == "masked":
        assert not bool(jnp.any(jnp.where(unused[:, :, None], got, 0)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [cases.RAGGED[0], cases.RAGGED[2], cases.RAGGED[4]], ids=lambda case: case.name)
def test_every_kind_of_tiling_gives_the_same_bits_on_hopper(case):
    work, operands = bench.work(case), operands_of(case, 2)
    expected = work.kernel(work.default, operands, None)
    for tiling in bench.tilings(case):
        assert int((work.kernel(tiling, operands, None) != expected).sum()) == 0, tiling
