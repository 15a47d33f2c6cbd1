"""Causal attention against float64 NumPy, its gradients, and its memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.attention import attention_backward, attention_forward, causal_attention, cudnn, reference, xla
from pallas_kernels.attention.bench import by_halves, with_gradients
from pallas_kernels.testing import assert_close

CASES = {  # name: (B, T, S, N, J, H, W, q_offset)
    "same_dims": (2, 9, 9, 3, 3, 8, 8, 0),
    "narrow_values": (2, 12, 12, 4, 4, 12, 8, 0),
    "grouped_heads": (1, 10, 10, 6, 2, 8, 16, 0),
    "after_a_prefix": (2, 5, 13, 2, 1, 8, 8, 8),
    "one_query": (3, 1, 7, 2, 2, 8, 4, 6),
    "keys_beyond_the_last_query": (1, 4, 11, 2, 2, 8, 8, 3),
}


def draw(name, dtype=jnp.float32):
    batch, queries, keys, heads, kv_heads, dim, value_dim, offset = CASES[name]
    rng = np.random.default_rng(0)
    shapes = ((batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, value_dim))
    return *(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes), dim**-0.5, offset


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", CASES)
def test_output_equals_the_float64_definition(name, dtype):
    q, k, v, scale, offset = draw(name, dtype)
    attend = functools.partial(causal_attention, scale=scale, q_offset=offset, implementation="xla")
    out = jax.jit(attend)(q, k, v)
    assert out.dtype == dtype
    assert_close(out, reference.causal_attention(q, k, v, scale=scale, q_offset=offset))


@pytest.mark.parametrize("name", ["grouped_heads", "after_a_prefix"])
def test_chunks_of_queries_give_the_same_output_and_gradients(name):
    q, k, v, scale, offset = draw(name)
    attend = functools.partial(xla.causal_attention, scale=scale, q_offset=jnp.asarray(offset))
    chunked = functools.partial(attend, max_scores=3 * q.shape[0] * q.shape[2] * k.shape[1])

    @functools.partial(jax.jit, static_argnums=0)
    def output_and_gradients(attend, q, k, v):
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(out)

    whole = output_and_gradients(attend, q, k, v)
    for got, expected in zip(output_and_gradients(chunked, q, k, v), whole, strict=True):
        assert_close(got, expected, tolerance=1e-5)


@pytest.mark.parametrize("chunks", [1, 4])
def test_the_backward_from_a_stored_output_is_that_of_the_whole(chunks):
    q, k, v, scale, _ = draw("narrow_values")
    do = jnp.asarray(np.random.default_rng(2).standard_normal((*q.shape[:3], v.shape[3])), jnp.float32)
    o, back = jax.vjp(lambda *x: causal_attention(*x, scale=scale, implementation="xla"), q, k, v)
    most = xla.MAX_SCORES if chunks == 1 else -(-q.shape[1] // chunks) * q.shape[0] * q.shape[2] * k.shape[1]
    for got, expected in zip(xla.causal_backward(q, k, v, o, do, scale=scale, max_scores=most), back(do), strict=True):
        assert_close(got, expected)


def test_gradients_equal_finite_differences_of_the_float64_definition():
    q, k, v, scale, offset = draw("grouped_heads")
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((*q.shape[:3], v.shape[3]))

    def loss(q, k, v):
        return jnp.vdot(causal_attention(q, k, v, scale=scale, q_offset=offset), jnp.asarray(weight, jnp.float32))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    arrays = [np.asarray(a, np.float64) for a in (q, k, v)]
    for which, grad in enumerate(grads):
        direction = rng.standard_normal(grad.shape)
        ends = []
        for sign in (1, -1):
            moved = list(arrays)
            moved[which] = arrays[which] + sign * 1e-5 * direction
            ends.append((reference.causal_attention(*moved, scale=scale, q_offset=offset) * weight).sum())
        assert np.vdot(grad, direction) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_one_offset_a_sequence():
    q, k, v, scale, _ = draw("after_a_prefix")
    offsets = jnp.asarray([2, 7])
    out = causal_attention(q, k, v, scale=scale, q_offset=offsets)
    for row, offset in enumerate((2, 7)):
        alone = slice(row, row + 1)
        expected = reference.causal_attention(q[alone], k[alone], v[alone], scale=scale, q_offset=offset)
        assert_close(out[alone], expected)


def test_later_keys_cannot_change_earlier_outputs():
    q, k, v, scale, _ = draw("narrow_values")
    attend = jax.jit(functools.partial(causal_attention, scale=scale))
    out = attend(q, k, v)
    changed = attend(q, k.at[:, 7:].add(100.0), v.at[:, 7:].add(100.0))
    np.testing.assert_array_equal(changed[:, :7], out[:, :7])
    assert not np.allclose(changed[:, 7:], out[:, 7:])


def test_long_inputs_never_hold_all_scores_forward_or_backward():
    batch, length, heads, dim = 1, 2048, 4, 16
    shape = jax.ShapeDtypeStruct((batch, length, heads, dim), jnp.float32)
    all_scores = 4 * batch * heads * length * length

    def temporary_bytes(max_scores):
        op = functools.partial(xla.causal_attention, scale=0.25, q_offset=jnp.asarray(0), max_scores=max_scores)
        loss = jax.grad(lambda q, k, v: op(q, k, v).sum(), argnums=(0, 1, 2))
        return jax.jit(loss).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(xla.MAX_SCORES) >= all_scores
    assert temporary_bytes(batch * heads * length * 128) < all_scores / 3


def test_heads_that_do_not_divide_are_one_clear_line():
    q, k, v, scale, _ = draw("same_dims")
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 key heads"):
        causal_attention(q, k[:, :, :2], v[:, :, :2], scale=scale)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="states what happens without a GPU")
def test_cudnn_asked_for_on_a_cpu_raises():
    q, k, v, scale, _ = draw("same_dims", jnp.bfloat16)
    with pytest.raises(ValueError, match="causal_attention: implementation 'cudnn' cannot run: the default backend"):
        causal_attention(q, k, v, scale=scale, implementation="cudnn")


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("same_dims", jnp.float32, "bfloat16"),
        ("narrow_values", jnp.bfloat16, "multiples of 8"),
        ("after_a_prefix", jnp.bfloat16, "q_offset = 0"),
    ],
)
def test_cudnn_names_what_it_cannot_do(monkeypatch, name, dtype, message):
    monkeypatch.setattr(cudnn.dispatch, "hopper_obstacle", lambda: None)
    q, k, v, _, offset = draw(name, dtype)
    assert message in cudnn.obstacle(q, k, v, offset)


WHOLE = functools.partial(with_gradients, implementation="cudnn")


@pytest.mark.parametrize("step", [WHOLE, by_halves], ids=("whole", "halves"))
def test_forward_and_backward_are_cudnns_two_calls_and_nothing_is_computed_beside_them(step):
    with dispatch.compiling_for(dispatch.Target("gpu", "9.0")), cudnn.compiling_for("9.0", 92800):
        query, value = (jax.ShapeDtypeStruct((4, 4096, 32, dim), jnp.bfloat16) for dim in (192, 128))
        traced = jax.jit(functools.partial(step, scale=192**-0.5)).trace(query, query, value, value)
        lowered = traced.lower(lowering_platforms=("cuda",))
    operations = re.findall(r"= \"?(stablehlo\.\w+)(?: @([\w$]+))?", lowered.as_text())
    calls = [target for operation, target in operations if operation == "stablehlo.custom_call"]
    assert calls == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    # Transposes from the calls' [B, N, T, W] to [B, T, N, W] keep the order of bytes; XLA for GPUs makes them bitcasts.
    beside = {operation.removeprefix("stablehlo.") for operation, _ in operations} - {"custom_call"}
    assert beside <= {"transpose", "constant", "broadcast_in_dim"}


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (128, 128)])
def test_cudnn_equals_the_definition_forward_and_backward_on_hopper(dim, value_dim):
    batch, length, heads = 2, 512, 4
    rng = np.random.default_rng(0)
    q, k, v, do = (
        jnp.asarray(rng.standard_normal((batch, length, heads, size)), jnp.bfloat16)
        for size in (dim, dim, value_dim, value_dim)
    )
    scale = dim**-0.5
    out, back = jax.vjp(functools.partial(causal_attention, scale=scale, implementation="cudnn"), q, k, v)
    assert_close(out, reference.causal_attention(q, k, v, scale=scale))
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        _, expected = jax.vjp(functools.partial(causal_attention, scale=scale, implementation="xla"), *wide)
        gradients = expected(do.astype(jnp.float32))
    for got, wanted in zip(back(do), gradients, strict=True):
        assert_close(got, wanted, tolerance=1.5e-2)


@pytest.mark.gpu
def test_cudnns_two_halves_are_its_whole_on_hopper():
    rng = np.random.default_rng(0)
    shapes = (192, 192, 128, 128)
    q, k, v, do = (jnp.asarray(rng.standard_normal((2, 256, 4, size)), jnp.bfloat16) for size in shapes)
    expected, back = jax.vjp(functools.partial(causal_attention, scale=0.07, implementation="cudnn"), q, k, v)
    o, sums = attention_forward(q, k, v, scale=0.07, implementation="cudnn")
    np.testing.assert_array_equal(o, expected)
    found = jax.jit(functools.partial(attention_backward, scale=0.07))(q, k, v, o, sums, do)
    for got, wanted in zip(found, back(do), strict=True):
        assert_close(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [False, True])
def test_cudnn_runs_inside_shard_map(check_vma):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 256, 4, size)), jnp.bfloat16) for size in (192, 192, 128))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")

    def local(q, k, v):
        out, back = jax.vjp(functools.partial(causal_attention, scale=0.07, implementation="cudnn"), q, k, v)
        return out, *back(out)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 4, check_vma=check_vma)
    for got, expected in zip(jax.jit(sharded)(q, k, v), jax.jit(local)(q, k, v), strict=True):
        assert_close(got, expected)
