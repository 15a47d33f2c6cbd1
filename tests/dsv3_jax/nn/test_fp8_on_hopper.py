"""FP8 layers with the Hopper kernels, on a GPU, against the same layers with their definitions, on its host's CPU."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.nn import fp8
from dsv3_jax.nn.fp8_attention import attend_and_project
from pallas_kernels import dispatch
from pallas_kernels.testing import calc_diff
from tests.dsv3_jax.nn.fp8_stack import make_stack, normal

pytestmark = pytest.mark.gpu

UNTUNED = {"xla_gpu_autotune_level": 0}
"""Trying XLA's own products takes longer than all else here."""


@contextlib.contextmanager
def on_the_cpu():
    """Inside, definitions run, on the CPU, whatever the accelerator's arithmetic."""
    with jax.default_device(jax.devices("cpu")[0]), dispatch.compiling_for(dispatch.Target("cpu")):
        yield


def run(function, *arguments):
    """``function`` of NumPy arrays traced anew and compiled for the default device; NumPy arrays."""
    program = jax.jit(lambda *given: function(*given)).lower(*arguments)
    options = {} if dispatch.platform() == "cpu" else UNTUNED
    return program.as_text().count("mosaic_gpu"), jax.device_get(program.compile(compiler_options=options)(*arguments))


@pytest.fixture(scope="module")
def defined():
    """Of a block: masters, codes, input; gradients and output by the definitions; the same in float32."""
    with on_the_cpu():
        loss, masters, x = make_stack()
        given = jax.device_get((masters, jax.jit(lambda masters: fp8.quantize_weights(masters))(masters), x))
        grad = jax.grad(loss, argnums=(0, 2), has_aux=True)
        (_, expected), (_, exact) = run(grad, *given), run(grad, given[0], {}, given[2].astype(np.float32))
    return given, expected, exact


@pytest.mark.parametrize("remat", ["none", "paper"])
def test_a_blocks_output_and_gradients_are_as_near_to_float32s_as_those_of_the_definitions(defined, remat):
    given, expected, exact = defined
    loss, *_ = make_stack()
    codes = jax.jit(lambda masters: fp8.quantize_weights(masters))(given[0])
    for got, wanted in zip(jax.tree.leaves(codes), jax.tree.leaves(given[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), wanted.view(np.uint8))
    grad = jax.grad(lambda *given: loss(*given, remat=remat), argnums=(0, 2), has_aux=True)
    kernels, found = run(grad, *given)
    assert kernels > 30
    leaves = zip(jax.tree.leaves_with_path(exact), jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for (path, wanted), left, right in leaves:
        ours, theirs = calc_diff(left, wanted), calc_diff(right, wanted)
        # After the first sum in another order the codes are other samples of the same roundings, their errors of the
        # same size. If 5% of the input change their last bit, matrices' vary by 5%, those of a few hundred sums by 30%.
        limit = 1.1 if wanted.size >= 2**14 else 1.5
        assert theirs / limit < ours < theirs * limit, (jax.tree_util.keystr(path), ours, theirs)


def test_attention_and_its_projection_are_near_the_definitions():
    shapes = ((2, 256, 4, 192), (2, 256, 4, 192), (2, 256, 4, 128), (2, 256, 640))
    q, k, v, dy = (np.asarray(normal(i, *shape, dtype=jnp.bfloat16)) for i, shape in enumerate(shapes))
    master = np.asarray(normal(4, 512, 640)) / 22

    def both(q, k, v, master, dy):
        def layer(q, k, v, master):
            weight = fp8.FP8Weight(master, fp8.quantize_weight(jax.lax.stop_gradient(master)))
            return attend_and_project(q, k, v, weight, scale=192**-0.5)

        y, back = jax.vjp(layer, q, k, v, master)
        return y, *back(dy)

    given = q, k, v, master, dy
    _, found = run(both, *given)
    with on_the_cpu():
        _, expected = run(both, *given)
    for name, left, right in zip(("y", "dq", "dk", "dv", "dw"), found, expected, strict=True):
        assert calc_diff(left, right) < 1e-3, name


@pytest.mark.parametrize("kernels", [False, True])
def test_a_linear_layer_is_the_same_function_on_a_gpu_with_its_kernels_and_without(monkeypatch, kernels):
    given = (np.asarray(normal(0, 256, 384, dtype=jnp.bfloat16)), np.asarray(normal(1, 384, 256)) / 20)
    given = (*given, np.asarray(normal(2, 256, 256, dtype=jnp.bfloat16)))

    def both(x, master, dy):
        def layer(x, master):
            return fp8.linear(
                fp8.quantize(x), fp8.FP8Weight(master, fp8.quantize_weight(jax.lax.stop_gradient(master)))
            )

        y, back = jax.vjp(layer, x, master)
        return y, *back(dy)

    with on_the_cpu():
        _, expected = run(both, *given)
    if not kernels:
        monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: "left out for a test")
    count, found = run(both, *given)
    assert bool(count) == kernels
    for name, left, right in zip(("y", "dx", "dw"), found, expected, strict=True):
        # Codes are equal bit for bit; sums in another order round to bfloat16 otherwise, here and there.
        assert calc_diff(left, right) < 1e-6, name
