"""AdamW over float32 master weights with both moments stored in bfloat16 (spec 8.1, 12; V3 section 3.3.3)."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dsv3_jax.config import OptimConfig


class AdamState(NamedTuple):
    """Adam's memory."""

    updates: Int[Array, ""]
    """Updates made so far (skipped steps are not among them)."""
    mu: Any
    """First moments, a tree like the parameters."""
    nu: Any
    """Second moments, a tree like the parameters."""


def scale_by_adam(
    beta1: float, beta2: float, eps: float, moment_dtype: Literal["bfloat16", "float32"]
) -> optax.GradientTransformation:
    """Adam's direction ``m_hat / (sqrt(v_hat) + eps)``, both moments stored as ``moment_dtype``.

    The arithmetic is float32: stored moments are widened, the update is made from the unrounded new moments, and only
    what is stored is rounded (property 30). ``optax.scale_by_adam`` can store the first moment alone in another type.
    """
    dtype = jnp.dtype(moment_dtype)

    def init(params: Any) -> AdamState:
        return AdamState(
            updates=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamState]:
        del params
        count = state.updates + 1
        mu = jax.tree.map(lambda g, m: _blend(m, g.astype(jnp.float32), beta1), updates, state.mu)
        nu = jax.tree.map(lambda g, v: _blend(v, jnp.square(g.astype(jnp.float32)), beta2), updates, state.nu)
        left1, left2 = 1.0 - beta1**count, 1.0 - beta2**count
        direction = jax.tree.map(lambda m, v: (m / left1) / (jnp.sqrt(v / left2) + eps), mu, nu)
        stored = jax.tree.map(lambda x: x.astype(dtype), (mu, nu))
        return direction, AdamState(count, *stored)

    return optax.GradientTransformation(init, update)


def _blend(old: jax.Array, new: jax.Array, beta: float) -> jax.Array:
    return (1.0 - beta) * new + beta * old.astype(jnp.float32)


def decay_mask(params: Any) -> Any:
    """Which leaves are matrices and therefore decay: a tree of booleans (spec 8.1 DEFAULT).

    Layers are stacked, so a norm's scale is ``[L, D]`` and its rank says nothing: the name decides. Leaves called
    ``scale`` (norms) and ``bias`` are vectors, everything else is a matrix, the embedding and the head among them.
    """

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
        return name not in ("scale", "bias") and leaf.ndim >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(optim: OptimConfig) -> optax.GradientTransformation:
    """AdamW without the learning rate: the step applies ``param - lr * update``, its rate being a host-side number.

    The update is ``adam_direction + weight_decay * param``, the second term on :func:`decay_mask` alone unless
    ``optim.decay`` is ``"all"``. Clipping is not part of it: see :func:`clip_by_norm`.
    """
    mask = decay_mask if optim.decay == "matrices" else None
    return optax.chain(
        scale_by_adam(optim.beta1, optim.beta2, optim.eps, optim.moment_dtype),
        optax.add_decayed_weights(optim.weight_decay, mask=mask),
    )


def clip_by_norm(grads: Any, norm: Float[Array, ""], max_norm: float) -> Any:
    """Scale gradients of the given L2 norm down to at most ``max_norm``.

    Args:
        grads: tree of arrays, or of one device's shares of them: the norm is known, so both are the same.
        norm: float32, over everything; where it is not finite the step is skipped.
        max_norm: 0 does not clip.
    """
    if not max_norm:
        return grads
    factor = jnp.minimum(1.0, max_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
