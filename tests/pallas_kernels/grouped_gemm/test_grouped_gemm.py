"""The grouped product against its definition, its gradients, and the work it compiles to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_gemm import cases, grouped_gemm, reference
from pallas_kernels.testing import assert_close, matmul_flops

EVERY_SMALL = pytest.mark.parametrize("case", [*cases.SMALL, cases.CHUNKED], ids=lambda case: case.name)


def run(case, x, w, dy, **kwargs):
    op = functools.partial(grouped_gemm, group_of_block=jnp.asarray(case.group_of_block()), block=case.block, **kwargs)

    @jax.jit
    def product_and_gradients(x, w, dy):
        y, back = jax.vjp(lambda x, w: op(x, w), x, w)
        return (y, *back(dy))

    return product_and_gradients(x, w, dy)


def definition(case, x, w, dy):
    op = functools.partial(reference.grouped_gemm, group_of_block=jnp.asarray(case.group_of_block()), block=case.block)

    @jax.jit
    def product_and_gradients(x, w, dy):
        y, back = jax.vjp(lambda x, w: op(x, w), x, w)
        return (y, *back(dy))

    return product_and_gradients(*(jnp.asarray(a, jnp.float32) for a in (x, w, dy)))


@EVERY_SMALL
def test_product_and_gradients_equal_the_definition_in_float32(case):
    arrays = [jnp.asarray(a) for a in case.arrays()]
    for got, expected in zip(run(case, *arrays, implementation="xla"), definition(case, *arrays), strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, expected)


@EVERY_SMALL
def test_a_float32_master_keeps_a_float32_gradient_under_bfloat16_rows(case):
    x, w, dy = case.arrays()
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    w = jnp.asarray(w)
    y, dx, dw = run(case, x, w, dy, implementation="xla")
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected_y, expected_dx, expected_dw = definition(case, x, w.astype(jnp.bfloat16), dy)
    assert_close(y, expected_y)
    assert_close(dx, expected_dx)
    assert_close(dw, expected_dw)  # the tolerance of float32: rounding through bfloat16 would be 1000 times it


def test_empty_groups_get_exactly_zero_gradients():
    case = cases.EMPTY_GROUP
    dw = run(case, *(jnp.asarray(a) for a in case.arrays()))[2]
    empty = np.asarray(case.rows_of_group) == 0
    assert empty.any()
    assert np.asarray(dw)[~empty].any(axis=(1, 2)).sum() != 0
    np.testing.assert_array_equal(np.asarray(dw)[empty], 0.0)


def test_rows_past_the_used_blocks_stay_zero():
    case = cases.TINY
    assert case.used_blocks < case.num_blocks
    x, w, dy = (jnp.asarray(a) for a in case.arrays())
    y, dx, _ = run(case, x, w, dy, num_blocks=jnp.int32(case.used_blocks))
    for rows in (y, dx):
        np.testing.assert_array_equal(rows[case.used_blocks * case.block :], 0.0)


@pytest.mark.parametrize("case", [cases.TRAINING, cases.CHUNKED], ids=lambda case: case.name)
def test_compiled_work_is_at_most_twice_the_useful_work(case):
    x, w, dy = (jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in case.arrays())
    assert case.num_blocks * case.block <= 1.3 * sum(case.rows_of_group)
    groups = jnp.asarray(case.group_of_block())

    def forward(x, w, dy):
        return grouped_gemm(x, w, groups, block=case.block, implementation="xla")

    def backward(x, w, dy):
        y, back = jax.vjp(lambda x, w: forward(x, w, dy), x, w)
        return y, *back(dy)

    for function, products in ((forward, 1), (backward, 3)):
        useful = products * case.useful_flops
        compiled = jax.jit(function).lower(x, w, dy).compile().cost_analysis()["flops"]
        assert compiled <= 2 * useful
        assert useful <= matmul_flops(function, x, w, dy) <= 2 * useful


def test_the_weight_is_not_kept_in_a_second_copy_for_the_backward():
    case = cases.TINY
    x, w, _ = case.arrays()
    x, w, groups = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w), jnp.asarray(case.group_of_block())
    _, back = jax.vjp(lambda x, w: grouped_gemm(x, w, groups, block=case.block, implementation="xla"), x, w)
    kept = [leaf for leaf in jax.tree.leaves(back) if getattr(leaf, "shape", None) == w.shape]
    assert [leaf.dtype for leaf in kept] == [jnp.float32]


def test_it_works_inside_shard_map_with_checked_replication():
    case = cases.TINY
    x, w, dy = (jnp.asarray(a) for a in case.arrays())
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")

    def local(x, w, dy, groups):
        def op(x, w):
            return grouped_gemm(x, w, groups, block=case.block, implementation="xla")

        y, back = jax.vjp(op, x, jax.lax.pcast(w, "data", to="varying"))
        dx, dw = back(dy)
        return y, dx, jax.lax.psum(dw, "data")

    groups = jnp.asarray(case.group_of_block())
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec, jax.P(), spec, spec), out_specs=(spec, spec, jax.P()))
    for got, expected in zip(jax.jit(sharded)(x, w, dy, groups), definition(case, x, w, dy), strict=True):
        assert_close(got, expected)


def test_wrong_shapes_are_one_clear_line():
    case = cases.TINY
    x, w, _ = (jnp.asarray(a) for a in case.arrays())
    groups = jnp.asarray(case.group_of_block())
    with pytest.raises((ValueError, TypeError), match="w_GKN"):  # a TypeError where jaxtyping checks first
        grouped_gemm(x[:, 1:], w, groups, block=case.block)
    with pytest.raises(ValueError, match=r"x_MK has \d+ rows, but group_of_block names \d+ blocks of 7"):
        grouped_gemm(x, w, groups, block=7)


def test_the_hopper_kernel_asked_for_on_a_cpu_raises():
    case = cases.TINY
    x, w, _ = (jnp.asarray(a) for a in case.arrays())
    with pytest.raises(ValueError, match="grouped_gemm: implementation 'pallas' cannot run"):
        grouped_gemm(x, w, jnp.asarray(case.group_of_block()), block=case.block, implementation="pallas")
