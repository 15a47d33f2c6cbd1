"""A few rows through every group's weight: the definition, the kernel in the interpreter, and (-m gpu) on Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.grouped_gemm import every_group_gemm, every_group_sm90
from pallas_kernels.testing import assert_close, spilled_bytes


def arrays_of(groups, rows, dim_k, dim_n, *, shared, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, dim_k) if shared else (groups, rows, dim_k), np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(rng.standard_normal((groups, dim_k, dim_n), np.float32), dtype)


def definition(x, w):
    wide = [np.asarray(a, np.float64) for a in (x, w)]
    return np.stack([(wide[0] if x.ndim == 2 else wide[0][g]) @ wide[1][g] for g in range(w.shape[0])])


@pytest.mark.parametrize("shared", [True, False])
def test_the_portable_product_equals_the_definition(shared):
    x, w = arrays_of(3, 5, 7, 9, shared=shared, dtype=jnp.float32)
    assert_close(every_group_gemm(x, w, implementation="xla"), definition(x, w))


@pytest.mark.parametrize(("rows", "dim_n", "shared"), [(13, 128, True), (8, 384, False)])
def test_results_in_the_interpreter_equal_the_definition_without_a_race(rows, dim_n, shared):
    x, w = arrays_of(3, rows, 128, dim_n, shared=shared)
    got = every_group_sm90.gemm(x, w, sm_count=2, interpret=plgpu.InterpretGPUParams(detect_races=True))
    jax.block_until_ready(got)
    assert not gpu_callbacks.get_races().races_found
    assert got.dtype == jnp.bfloat16
    assert_close(got, definition(x, w))


def test_the_kernel_lowers_for_hopper_and_fits_in_its_shared_memory(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    avals = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((32, 2048), (64, 2048, 1536))]
    lowered = jax.jit(every_group_gemm).trace(*avals).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("rows", "dims", "dtype", "message"),
    [
        (8, (128, 128), jnp.float32, "x must be bfloat16, got float32"),
        (65, (128, 128), jnp.bfloat16, "it takes at most 64 rows of a group, got 65"),
        (8, (96, 128), jnp.bfloat16, "K must be a multiple of 64 and N of 128, got 96 and 128"),
    ],
)
def test_what_the_kernel_cannot_do_is_named(monkeypatch, rows, dims, dtype, message):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    x, w = jnp.zeros((rows, dims[0]), dtype), jnp.zeros((2, *dims), dtype)
    with pytest.raises(ValueError, match=f"'pallas' cannot run: {message}"):
        every_group_gemm(x, w, implementation="pallas")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "dims", "shared"),
    [(32, (2048, 1536), True), (32, (768, 2048), False), (64, (256, 384), False), (5, (192, 128), True)],
)
def test_results_on_hopper_equal_the_definition(rows, dims, shared):
    x, w = arrays_of(64, rows, *dims, shared=shared)
    kernel = jax.jit(functools.partial(every_group_gemm, implementation="pallas"))
    expected = jax.jit(functools.partial(every_group_gemm, implementation="xla"))(
        x.astype(jnp.float32), w.astype(jnp.float32)
    )
    got = kernel(x, w)
    assert_close(got, expected)
    for _ in range(10):
        np.testing.assert_array_equal(np.asarray(kernel(x, w)), np.asarray(got))


@pytest.mark.gpu
def test_no_kernel_spills_registers():
    program = (
        "import jax, jax.numpy as jnp\n"
        "from pallas_kernels.grouped_gemm.every_group_sm90 import gemm\n"
        "for n in (128, 256):\n"
        "    jax.block_until_ready(gemm(jnp.zeros((32, 256), jnp.bfloat16), jnp.zeros((2, 256, n), jnp.bfloat16)))\n"
    )
    spilled = spilled_bytes(program)
    assert len(spilled) >= 2
    assert not any(spilled)
