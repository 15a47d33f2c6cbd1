"""RMSNorm with quantized output: the definition, its gradient, and the Hopper kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.norm_quantize import backward_sm90, cases, norm_backward, norm_quantize, op, pallas_sm90, reference
from pallas_kernels.quantize import quantize_rows
from pallas_kernels.testing import assert_close

EPS = 1e-6


def arrays_of(case, dtype=jnp.bfloat16):
    x = jnp.asarray(case.array(), dtype)
    return x, jnp.asarray(1 + 0.1 * np.random.default_rng(1).standard_normal(case.shape[1:]), jnp.float32)


def check_nearly_equal(got, expected):
    """Equal but where another order of summation rounded y otherwise: rarely, and then to a neighbour."""
    (tiles, y), (wanted, wanted_y) = got[:2], expected[:2]
    assert_close(tiles.scale, wanted.scale, tolerance=1e-3)
    codes, wanted_codes = (np.asarray(t.q).view(np.uint8).astype(int) for t in (tiles, wanted))
    assert np.abs(codes - wanted_codes).max() <= 1
    assert (codes != wanted_codes).mean() < 2e-3
    if wanted_y is not None:
        assert_close(y, wanted_y, tolerance=1e-3)


@pytest.mark.parametrize("case", [cases.SMALL[1], cases.EDGES[0]], ids=lambda case: case.name)
def test_the_tiles_are_those_of_the_norm_and_its_backward_is_the_norms_own(case):
    x, weight = arrays_of(case, jnp.float32)
    dy = jnp.asarray(np.random.default_rng(2).standard_normal(x.shape), jnp.float32)

    def plain(x, weight):
        return x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True) + EPS) * weight

    @jax.jit
    def run(x, weight, dy):
        tiles, y, _ = norm_quantize(x, weight, eps=EPS, with_output=True)
        carried = jax.vjp(lambda x, w: norm_quantize(x, w, eps=EPS)[1], x, weight)[1](dy)
        return tiles, y, quantize_rows(y), carried, plain(x, weight), jax.vjp(plain, x, weight)[1](dy)

    tiles, y, expected, gradients, expected_y, expected_gradients = run(x, weight, dy)
    np.testing.assert_array_equal(tiles.q, expected.q)
    np.testing.assert_array_equal(tiles.scale, expected.scale)
    assert_close(y, expected_y)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(got, wanted, tolerance=1e-5)


def test_rounding_to_bfloat16_comes_before_quantizing_even_compiled():
    x, weight = arrays_of(cases.SMALL[0])
    tiles, y, _ = jax.jit(functools.partial(norm_quantize, eps=EPS, with_output=True))(x, weight)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(tiles.q, jax.jit(quantize_rows)(y).q)


def test_only_the_input_and_the_weight_are_kept():
    x, weight = arrays_of(cases.SMALL[0])
    back = jax.eval_shape(lambda x, w: jax.vjp(lambda *a: norm_quantize(*a, eps=EPS), x, w)[1], x, weight)
    kept = [leaf for leaf in jax.tree.leaves(back) if getattr(leaf, "size", 0) >= weight.size]
    assert sorted(leaf.size for leaf in kept) == [weight.size, x.size]


def test_the_kernel_in_the_interpreter_equals_the_definition_without_a_race():
    x, weight = (a[:8] if a.ndim == 2 else a for a in arrays_of(cases.SMALL[1]))
    params = plgpu.InterpretGPUParams(detect_races=True)
    got = pallas_sm90.norm_quantize(x, weight, EPS, False, True, interpret=params)
    check_nearly_equal(
        jax.block_until_ready(got),
        jax.jit(reference.norm_quantize, static_argnums=(2, 3, 4))(x, weight, EPS, False, True),
    )
    assert not gpu_callbacks.get_races().races_found


def test_the_residual_paths_gradient_is_added_before_the_sum_is_rounded():
    x, weight = arrays_of(cases.SMALL[0])
    dy, dresidual = (jax.random.normal(jax.random.key(seed), x.shape, x.dtype) for seed in (1, 2))

    @jax.jit
    def gradients(x, weight, dy, dresidual):
        _, back = jax.vjp(lambda x, w: norm_quantize(x, w, eps=EPS)[1:], x, weight)
        wide = (array.astype(jnp.float32) for array in (x, weight, dy))
        return back((dy, dresidual)), reference.norm_backward(*wide, eps=EPS)

    (dx, dweight), (expected, expected_dweight) = gradients(x, weight, dy, dresidual)
    rounded_once = (expected + dresidual.astype(jnp.float32)).astype(x.dtype)
    assert (dx != rounded_once).mean() < 1e-3 < (dx != expected.astype(x.dtype) + dresidual).mean()
    assert_close(dweight, expected_dweight)


def test_without_a_residual_path_no_zeros_are_added(monkeypatch):
    seen = []
    monkeypatch.setattr(
        op, "norm_backward", lambda *arrays, **how: seen.append(arrays) or norm_backward(*arrays, **how)
    )
    x, weight = arrays_of(cases.SMALL[0])

    def layer(x, weight, residual):
        _, y, again = norm_quantize(x, weight, eps=EPS)
        return jnp.sum(y + again if residual else y)

    for residual in (False, True):
        jax.eval_shape(jax.grad(jax.checkpoint(functools.partial(layer, residual=residual))), x, weight)
    assert [arrays[3] is None for arrays in seen] == [True, False]


@pytest.mark.parametrize(
    ("dim_k", "residual", "rows"), [(512, True, 24), (768, False, 24)], ids=["with a residual path", "without"]
)
def test_the_backward_kernel_in_the_interpreter_equals_the_definition_without_a_race(
    monkeypatch, dim_k, residual, rows
):
    # Three steps on one block: its stages are filled again.
    monkeypatch.setattr(backward_sm90, "blocks_per_sm", lambda *_: 1)
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy, dresidual = (jax.random.normal(key, (rows, dim_k), jnp.bfloat16) for key in keys)
    weight = 1 + 0.1 * jax.random.normal(keys[0], (dim_k,))
    given = (x, weight, dy, dresidual if residual else None)
    params = plgpu.InterpretGPUParams(detect_races=True)
    got = jax.block_until_ready(backward_sm90.norm_backward(*given, eps=EPS, sm_count=1, interpret=params))
    expected = jax.jit(functools.partial(reference.norm_backward, eps=EPS))(*given)
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("case", [cases.BENCHED[0], cases.BENCHED[-1]], ids=lambda case: case.name)
def test_the_kernel_lowers_for_hopper(monkeypatch, case):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    x, weight = jax.ShapeDtypeStruct(case.shape, jnp.bfloat16), jax.ShapeDtypeStruct(case.shape[1:], jnp.float32)
    run = jax.jit(functools.partial(norm_quantize, eps=EPS, with_output=True))
    assert "mosaic_gpu" in run.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("dim_k", "message"), [(128, "a multiple of 256, got 128"), (8448, "at most 8192, got 8448")])
def test_what_the_kernel_cannot_do_is_named(monkeypatch, dim_k, message):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    with pytest.raises(ValueError, match=f"K must be {message}"):
        norm_quantize(jnp.zeros((128, dim_k), jnp.bfloat16), jnp.ones(dim_k), eps=EPS, implementation="pallas")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "power_of_two"),
    [(case, power_of_two) for power_of_two in (False, True) for case in cases.SMALL]
    + [(case, False) for case in cases.BENCHED],
    ids=lambda given: getattr(given, "name", str(given)),
)
def test_results_on_hopper_equal_the_definition(case, power_of_two):
    if case in cases.SMALL:
        x, weight = arrays_of(case)
    else:
        x = jax.random.normal(jax.random.key(0), case.shape, jnp.bfloat16)
        weight = 1 + 0.1 * jax.random.normal(jax.random.key(1), case.shape[1:])
    run = functools.partial(norm_quantize, eps=EPS, power_of_two=power_of_two, with_output=True)
    got, expected = (jax.jit(functools.partial(run, implementation=name))(x, weight) for name in ("pallas", "xla"))
    check_nearly_equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "with a residual path"])
@pytest.mark.parametrize("case", [*cases.SMALL, *cases.BENCHED], ids=lambda case: case.name)
def test_gradients_on_hopper_are_the_definitions(case, residual):
    x, weight = arrays_of(case) if case in cases.SMALL else (None, None)
    keys = jax.random.split(jax.random.key(0), 4)
    if x is None:
        x, weight = jax.random.normal(keys[0], case.shape, jnp.bfloat16), jax.random.normal(keys[1], case.shape[1:])
    dy, dresidual = (jax.random.normal(key, case.shape, jnp.bfloat16) for key in keys[2:])
    given = (x, weight, dy, dresidual if residual else None)
    run = functools.partial(norm_backward, eps=EPS)
    got, expected = (jax.jit(functools.partial(run, implementation=name))(*given) for name in ("pallas", "xla"))
    assert_close(got[0], expected[0], tolerance=1e-3)
    assert_close(got[1], expected[1], tolerance=1e-5)
