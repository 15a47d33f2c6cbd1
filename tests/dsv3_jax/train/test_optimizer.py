"""AdamW against optax, property 30, the decay mask, clipping, and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import OptimConfig, load_config
from dsv3_jax.train.optimizer import clip_by_norm, decay_mask, make_optimizer, scale_by_adam
from dsv3_jax.train.state import abstract_state


def _tree(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"embed": {"table": draw(7, 4)}, "trunk": {"norm": {"scale": draw(3, 4)}, "q": {"kernel": draw(3, 4, 5)}}}


def test_decay_mask_spares_stacked_norm_scales_and_keeps_every_matrix():
    mask = decay_mask(_tree(0))
    assert mask == {"embed": {"table": True}, "trunk": {"norm": {"scale": False}, "q": {"kernel": True}}}


def test_decay_mask_of_a_whole_model_is_what_is_a_matrix_in_one_layer():
    config = load_config("tiny")
    params = abstract_state(config).params
    stacked = {"dense", "moe"}
    names, leaves = zip(*jax.tree_util.tree_flatten_with_path(params)[0], strict=True)
    one_layer = [leaf.ndim - (path[0].key in stacked) for path, leaf in zip(names, leaves, strict=True)]
    assert jax.tree.leaves(decay_mask(params)) == [ndim >= 2 for ndim in one_layer]
    assert min(one_layer) == 1


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_float32_moments_equal_optax_adamw_step_by_step(decay):
    config = OptimConfig(moment_dtype="float32", decay=decay, eps=1e-8)
    mask = decay_mask if decay == "matrices" else None
    theirs = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask)
    ours = make_optimizer(config)
    params_a = params_b = _tree(1)
    state_a, state_b = ours.init(params_a), theirs.init(params_b)
    for step in range(5):
        grads = _tree(10 + step)
        update, state_a = ours.update(grads, state_a, params_a)
        params_a = jax.tree.map(lambda p, u: p - 1e-3 * u, params_a, update)
        update, state_b = theirs.update(grads, state_b, params_b)
        params_b = optax.apply_updates(params_b, update)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-8), params_a, params_b)


def test_bfloat16_moments_halve_the_bytes_of_the_state():
    params = _tree(2)
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        state = scale_by_adam(0.9, 0.95, 1e-8, dtype).init(params)
        assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype(dtype)}
        sizes[dtype] = sum(leaf.nbytes for leaf in jax.tree.leaves((state.mu, state.nu)))
    assert sizes["bfloat16"] * 2 == sizes["float32"]


def test_bfloat16_moments_are_rounded_only_when_stored():
    """The update of each step follows float32 arithmetic on the stored moments exactly (property 30)."""
    params = {"kernel": jnp.zeros((64, 8))}
    optimizer = scale_by_adam(0.9, 0.95, 1e-8, "bfloat16")
    state = optimizer.init(params)
    mu = nu = np.zeros((64, 8), np.float32)
    for step in range(1, 4):
        grad = np.random.default_rng(step).standard_normal((64, 8)).astype(np.float32)
        update, state = optimizer.update({"kernel": jnp.asarray(grad)}, state, params)
        mu_new = np.float32(0.9) * mu + np.float32(0.1) * grad
        nu_new = np.float32(0.95) * nu + np.float32(0.05) * grad * grad
        expected = (mu_new / (1 - 0.9**step)) / (np.sqrt(nu_new / (1 - 0.95**step)) + 1e-8)
        assert update["kernel"].dtype == jnp.float32
        np.testing.assert_allclose(update["kernel"], expected, rtol=1e-5, atol=1e-7)
        rounded = (mu_new.astype(jnp.bfloat16) / (1 - 0.9**step)).astype(np.float32)
        assert np.max(np.abs(expected * (np.sqrt(nu_new / (1 - 0.95**step))) - rounded)) > 1e-4
        mu, nu = (np.asarray(x["kernel"].astype(jnp.float32)) for x in (state.mu, state.nu))
        np.testing.assert_allclose(mu, mu_new, rtol=2**-8)
        np.testing.assert_allclose(nu, nu_new, rtol=2**-8)


def test_clipping_scales_to_the_limit():
    grads = _tree(3, scale=10.0)
    clipped = clip_by_norm(grads, optax.tree.norm(grads), 1.0)
    assert float(optax.tree.norm(clipped)) == pytest.approx(1.0, rel=1e-6)
    theirs, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, theirs)


def test_clipping_leaves_small_zero_and_unclipped_gradients_alone():
    grads = _tree(4, scale=1e-3)
    for tree, limit in ((grads, 1.0), (jax.tree.map(jnp.zeros_like, grads), 1.0), (_tree(4, scale=10.0), 0.0)):
        clipped = clip_by_norm(tree, optax.tree.norm(tree), limit)
        jax.tree.map(np.testing.assert_array_equal, clipped, tree)
