"""The ring: every device's tokens visit all devices in turn, and what they gather there comes home with them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import varying
from sharding.expert_parallel.choices import ExpertFn, local_experts, localize
from sharding.expert_parallel.payload import pack, unpack
from sharding.expert_parallel.placement import ExpertParallel


def _shift(placement: ExpertParallel, tree: Any) -> Any:
    """Everything one rank onward."""
    ring = [(rank, (rank + 1) % placement.size) for rank in range(placement.size)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, placement.axis, ring), tree)


def visit_the_others(
    placement: ExpertParallel, stop: Callable[[Any], tuple[Any, Any]], load: Any, kept: Any
) -> tuple[Any, Any]:
    """``load`` visits the other ranks; at each, ``stop`` makes what is added up on its way home and what stays.

    Returns what came home, and ``kept`` with all that stayed here. Neither transfer of a stop waits for its work.
    """

    def one_stop(state: tuple[Any, Any, Any], _: None) -> tuple[tuple[Any, Any, Any], None]:
        load, gathered, kept = state
        onward, moved = _shift(placement, (load, gathered))
        return (onward, *_add((moved, kept), stop(load))), None

    load = _shift(placement, load)
    gathered = None
    if placement.size > 2:
        gathered = jax.tree.map(
            lambda leaf: varying.like(jnp.zeros(leaf.shape, leaf.dtype), *jax.tree.leaves(load)),
            jax.eval_shape(stop, load)[0],
        )
        (load, gathered, kept), _ = lax.scan(one_stop, (load, gathered, kept), None, length=placement.size - 2)
        gathered = _shift(placement, gathered)
    going, staying = stop(load)
    gathered = going if gathered is None else _add(gathered, going)
    return _shift(placement, gathered), _add(kept, staying)


def _add(left: Any, right: Any) -> Any:
    return jax.tree.map(jnp.add, left, right)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _ring(
    placement: ExpertParallel, expert_fn: ExpertFn, experts: int, block: int, inputs: Any, idx_TK: Array
) -> Array:
    return _forward(placement, expert_fn, experts, block, inputs, idx_TK)[0]


def _stop(
    placement: ExpertParallel, expert_fn: ExpertFn, experts: int, block: int, idx_TK: Array, inputs: Any
) -> Array:
    """What this rank's experts make of the tokens that are here."""
    params, x_TD, weights_TK = inputs
    first = lax.axis_index(placement.axis) * experts
    idx_TC, weights_TC = localize(idx_TK, weights_TK, first, experts)
    return local_experts(expert_fn, params, x_TD, idx_TC, weights_TC, experts=experts, block=block)


def loaded(placement: ExpertParallel, x_TD: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Rows as they travel, and the function that reads them."""
    if not placement.fp8:
        return x_TD, lambda rows: rows
    return pack(x_TD), lambda rows: unpack(rows, x_TD.shape[1], x_TD.dtype)


def _forward(
    placement: ExpertParallel, expert_fn: ExpertFn, experts: int, block: int, inputs: Any, idx_TK: Array
) -> tuple[Array, Any]:
    params, x_TD, weights_TK = inputs
    work = functools.partial(_stop, placement, expert_fn, experts, block)
    load, read = loaded(placement, x_TD)
    y_TD, own_back = jax.vjp(functools.partial(work, idx_TK), (params, read(load), weights_TK))

    def stop(visitor: Any) -> tuple[Array, tuple[()]]:
        load, weights_TK, idx_TK = visitor
        return work(idx_TK, (params, read(load), weights_TK)), ()

    home_TD, _ = visit_the_others(placement, stop, (load, weights_TK, idx_TK), ())
    return y_TD + home_TD, (own_back, inputs, idx_TK)


def _backward(
    placement: ExpertParallel, expert_fn: ExpertFn, experts: int, block: int, saved: Any, dy_TD: Array
) -> tuple[Any, None]:
    own_back, (params, x_TD, weights_TK), idx_TK = saved
    work = functools.partial(_stop, placement, expert_fn, experts, block)
    load, read = loaded(placement, x_TD)
    dload, dread = loaded(placement, dy_TD)
    dparams, *own = own_back(dread(dload))[0]

    def stop(visitor: Any) -> tuple[Any, Any]:
        load, weights_TK, idx_TK, dload = visitor
        _, back = jax.vjp(functools.partial(work, idx_TK), (params, read(load), weights_TK))
        dparams, *going = back(dread(dload))[0]
        return going, dparams

    home, dparams = visit_the_others(placement, stop, (load, weights_TK, idx_TK, dload), dparams)
    return (dparams, *_add(own, home)), None


_ring.defvjp(_forward, _backward)


def ring(
    placement: ExpertParallel,
    expert_fn: ExpertFn,
    params: Any,
    x_TD: Float[Array, "T D"],
    idx_TK: Int[Array, "T K"],
    weights_TK: Float[Array, "T K"],
    *,
    experts: int,
    block: int,
) -> Float[Array, "T D"]:
    """The transport ``ring``; ``experts`` are those of one rank."""
    return _ring(placement, expert_fn, experts, block, (params, x_TD, weights_TK), idx_TK)
