"""FP8 blocks with the Hopper kernels against the same blocks with their portable definitions, on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.nn import fp8
from dsv3_jax.nn.fp8_attention import attend_and_project
from pallas_kernels import dispatch
from pallas_kernels.testing import calc_diff
from tests.dsv3_jax.nn.fp8_stack import make_stack

pytestmark = pytest.mark.gpu


def without_kernels(monkeypatch, run):
    """``run()`` where no kernel can run."""
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "hopper_obstacle", lambda: "left out for a test")
        return jax.block_until_ready(run())


@pytest.mark.parametrize("remat", ["none", "paper"])
def test_a_blocks_output_and_gradients_are_as_near_to_float32s_as_those_of_the_definitions(monkeypatch, remat):
    loss, masters, x = make_stack()
    grad = jax.grad(lambda *given: loss(*given, remat=remat), argnums=(0, 2), has_aux=True)

    def run():
        codes = jax.jit(lambda masters: fp8.quantize_weights(masters))(masters)
        program = jax.jit(lambda *given: grad(*given)).lower(masters, codes, x)
        return program.as_text().count("mosaic_gpu"), program.compile()(masters, codes, x)

    kernels, found = run()
    none, expected = without_kernels(monkeypatch, run)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda *given: grad(*given))(masters, {}, x.astype(jnp.float32))
    assert kernels > 30
    assert none == 0
    for (path, wanted), left, right in zip(
        jax.tree.leaves_with_path(exact), jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        # Not to each other: one changed last bit in 5% of the input moves these gradients by 1e-3 to 3.6e-3.
        ours, theirs = calc_diff(left, wanted), calc_diff(right, wanted)
        assert ours < 1.5 * theirs + 1e-4, (jax.tree_util.keystr(path), ours, theirs)


def test_attention_and_its_projection_are_near_the_definitions(monkeypatch):
    rng = np.random.default_rng(0)
    shapes = ((2, 256, 4, 192), (2, 256, 4, 192), (2, 256, 4, 128))
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    master = jnp.asarray(rng.standard_normal((512, 640)) / 22, jnp.float32)
    dy = jnp.asarray(rng.standard_normal((2, 256, 640)), jnp.bfloat16)

    def run():
        def layer(q, k, v, master):
            weight = fp8.FP8Weight(master, fp8.quantize_weight(jax.lax.stop_gradient(master)))
            return attend_and_project(q, k, v, weight, scale=192**-0.5)

        def both(q, k, v, master, dy):
            y, back = jax.vjp(layer, q, k, v, master)
            return y, *back(dy)

        return jax.jit(both)(q, k, v, master, dy)

    found, expected = run(), without_kernels(monkeypatch, run)
    for name, left, right in zip(("y", "dq", "dk", "dv", "dw"), found, expected, strict=True):
        assert calc_diff(left, right) < 1e-3, name
