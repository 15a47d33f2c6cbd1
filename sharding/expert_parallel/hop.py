"""One hop: copies of tokens to the ranks that need them, whatever happens there, and the sums of what comes back.

The backward pass of a dispatch is a combine and the other way round, over the same slots; so is its data type.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.permute import Plan, permute, unpermute
from sharding.expert_parallel.choices import localize
from sharding.expert_parallel.copies import Copies, find_copies, slots_of_round
from sharding.expert_parallel.payload import pack, unpack
from sharding.expert_parallel.placement import received

DISPATCHED = "dispatched"
"""Name of what arrives, for a policy of recomputation: where it is saved, nothing is sent a second time."""

Inner = Callable[[Any, Array, Array, Array, int], Array]
"""``(params, x_RD, idx_RC, weights_RC, most_pairs) -> y_RD``: what the receiving ranks do with their rows."""


@dataclass(frozen=True)
class Hop:
    """An exchange among groups of ranks of a mesh axis."""

    axis: str
    fan: int
    """Ranks in a group."""
    experts: int
    """Experts that a choice counts as one destination: of a rank, or of a node."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """The groups, each in the order of destinations; None: the whole axis."""
    room: int = 0
    """(token, choice) pairs to one destination in a round; 0 has room for the worst case, in one round."""
    fp8: bool = False


def exchange(hop: Hop, rows_SY: Array) -> Array:
    """Slots to their destinations; the same again brings every slot back."""
    groups = [list(group) for group in hop.groups] if hop.groups else None
    return lax.all_to_all(rows_SY, hop.axis, 0, 0, axis_index_groups=groups, tiled=True)


def send(hop: Hop, x_TD: Array, slots: Plan) -> Array:
    """Rows of tokens to the slots of other ranks; forward alone."""
    if not hop.fp8:
        return checkpoint_name(exchange(hop, permute(x_TD, slots)), DISPATCHED)
    bytes_SY = exchange(hop, permute(pack(x_TD), slots))
    return unpack(checkpoint_name(bytes_SY, DISPATCHED), x_TD.shape[1], x_TD.dtype)


def collect(hop: Hop, y_SD: Array, slots: Plan) -> Array:
    """What comes back in the slots, summed by token; forward alone."""
    return unpermute(exchange(hop, y_SD), jnp.ones(slots.row_of_pair_TK.shape, jnp.float32), slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(hop: Hop, x_TD: Array, slots: Plan) -> Array:
    return send(hop, x_TD, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(hop: Hop, y_SD: Array, slots: Plan) -> Array:
    return collect(hop, y_SD, slots)


def _keep_slots(move: Callable[[Hop, Array, Plan], Array]) -> Callable[[Hop, Array, Plan], tuple[Array, Plan]]:
    return lambda hop, rows, slots: (move(hop, rows, slots), slots)


_dispatch.defvjp(_keep_slots(send), lambda hop, slots, dx_SD: (collect(hop, dx_SD, slots), None))
_combine.defvjp(_keep_slots(collect), lambda hop, slots, dy_TD: (send(hop, dy_TD, slots), None))


def run_hop(
    hop: Hop,
    inner: Inner,
    params: Any,
    x_TD: Float[Array, "T D"],
    idx_TK: Int[Array, "T K"],
    weights_TK: Float[Array, "T K"],
    _most_pairs: int | None = None,
) -> Float[Array, "T D"]:
    """The sum over a token's destinations of ``inner``'s rows there; itself an ``inner`` of a hop before it.

    ``inner`` gets for each slot the choices that its group member owns, numbered from 0, and a bound of how many.
    It must close over no traced value.
    """
    copies = find_copies(idx_TK, hop.fan, hop.experts, hop.room)
    if not hop.room or hop.room >= idx_TK.shape[0] * min(idx_TK.shape[1], hop.experts):
        return _round(hop, inner, (params, x_TD, weights_TK), idx_TK, copies, 0)
    rounds = lax.pmax(copies.rounds, hop.axis)  # over the whole axis: nobody may leave a loop of collectives early
    return _rounds(hop, inner, (params, x_TD, weights_TK), idx_TK, copies, rounds)


def _round(
    hop: Hop, inner: Inner, inputs: tuple[Any, Array, Array], idx_TK: Array, copies: Copies, turn: Array | int
) -> Array:
    """What one round's copies add to every token."""
    params, x_TD, weights_TK = inputs
    with jax.named_scope("dispatch"):
        slots, idx_RC, weights_RC, most_pairs = route(hop, idx_TK, weights_TK, copies, turn)
        x_RD: Any = _dispatch(hop, x_TD, slots)
    y_RD = inner(params, x_RD, idx_RC, weights_RC, most_pairs)
    with jax.named_scope("combine"):
        return _combine(hop, y_RD, slots)


def route(
    hop: Hop, idx_TK: Int[Array, "T K"], weights_TK: Float[Array, "T K"], copies: Copies, turn: Array | int = 0
) -> tuple[Plan, Int[Array, "R C"], Float[Array, "R C"], int]:
    """The way of one round's copies: slots to travel in, and what the receiving rank is told of the rows that come:
    choices that it owns, numbered from 0, their weights, and a bound of how many (row, choice) pairs there are."""
    columns = min(idx_TK.shape[1], hop.experts)
    rows, most_pairs = received(idx_TK.shape[0], columns, hop.fan, hop.room)
    slots = slots_of_round(copies, turn, rows // hop.fan)
    idx_SK = idx_TK.at[slots.token_of_row_M].get(mode="fill", fill_value=hop.fan * hop.experts)
    first_S = jnp.repeat(jnp.arange(hop.fan) * hop.experts, slots.block)
    idx_SC, weights_SC = localize(idx_SK, permute(weights_TK, slots), first_S, hop.experts)
    # One message for both: float32 holds the numbers of experts exactly.
    record = exchange(hop, jnp.concatenate([weights_SC.astype(jnp.float32), idx_SC.astype(jnp.float32)], axis=1))
    record = checkpoint_name(record, DISPATCHED)
    idx_RC = lax.stop_gradient(record[:, columns:]).astype(jnp.int32)
    return slots, idx_RC, record[:, :columns], most_pairs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounds(hop: Hop, inner: Inner, inputs: Any, idx_TK: Array, copies: Copies, rounds: Array) -> Array:
    return _later_rounds(hop, inner, inputs, idx_TK, copies, rounds, _round(hop, inner, inputs, idx_TK, copies, 0))


def _later_rounds(
    hop: Hop, inner: Inner, inputs: Any, idx_TK: Array, copies: Copies, rounds: Array, y_TD: Array
) -> Array:
    def add_round(turn: Array, y_TD: Array) -> Array:
        return y_TD + _round(hop, inner, inputs, idx_TK, copies, turn)

    return lax.fori_loop(1, rounds, add_round, y_TD)


def _rounds_forward(
    hop: Hop, inner: Inner, inputs: Any, idx_TK: Array, copies: Copies, rounds: Array
) -> tuple[Array, Any]:
    y_TD, first_back = jax.vjp(lambda inputs: _round(hop, inner, inputs, idx_TK, copies, 0), inputs)
    y_TD = _later_rounds(hop, inner, inputs, idx_TK, copies, rounds, y_TD)
    return y_TD, (first_back, inputs, idx_TK, copies, rounds)


def _rounds_backward(hop: Hop, inner: Inner, saved: Any, dy_TD: Array) -> tuple[Any, None, None, None]:
    first_back, inputs, idx_TK, copies, rounds = saved

    def add_round(turn: Array, total: Any) -> Any:
        _, back = jax.vjp(lambda inputs: _round(hop, inner, inputs, idx_TK, copies, turn), inputs)
        return jax.tree.map(jnp.add, total, back(dy_TD)[0])

    return lax.fori_loop(1, rounds, add_round, first_back(dy_TD)[0]), None, None, None


_rounds.defvjp(_rounds_forward, _rounds_backward)
