"""``routed``: the one contract of all transports."""

import functools
from typing import Any

from jaxtyping import Array, Float, Int

from sharding.expert_parallel.choices import ExpertFn, local_experts
from sharding.expert_parallel.hop import Hop, run_hop
from sharding.expert_parallel.placement import ExpertParallel, pair_room
from sharding.expert_parallel.ring import ring

ONE_RANK = ExpertParallel()


def routed(
    x_TD: Any,
    experts_TK: Int[Array, "T K"],
    weights_TK: Float[Array, "T K"],
    params: Any,
    expert_fn: ExpertFn,
    *,
    num_experts: int,
    block: int,
    placement: ExpertParallel = ONE_RANK,
) -> Float[Array, "T D"]:
    """Each token's weighted sum over its experts, wherever they live; called per device inside ``jax.shard_map``.

    With one rank nothing is communicated and no mesh is needed. Whatever the transport, no choice is dropped, and
    values and gradients are those of one device up to the order of sums (exactly what FP8 dispatch makes of them
    where that is asked for; its gradient is straight-through).

    Args:
        x_TD: this device's tokens, ``[T, D]``; with one rank whatever ``expert_fn`` takes for them.
        experts_TK: distinct experts of each token, in ``[0, num_experts)``.
        weights_TK: their weights, float32.
        params: this rank's ``num_experts / placement.size`` experts' arrays, as ``expert_fn`` takes them. Their
            gradients are of all tokens of the axis, and need no sum over it.
        expert_fn: this rank's experts; see :data:`ExpertFn`.
        num_experts: E, of all ranks.
        block: rows that one expert's share is padded to a multiple of.
        placement: ranks and transport.

    Raises:
        ValueError: the transport cannot run on this axis, or the axis does not divide the experts.
    """
    placement.check(num_experts)
    local = num_experts // placement.size
    if placement.size == 1:
        return local_experts(expert_fn, params, x_TD, experts_TK, weights_TK, experts=local, block=block)
    if placement.transport == "ring":
        return ring(placement, expert_fn, params, x_TD, experts_TK, weights_TK, experts=local, block=block)
    tokens, choices = experts_TK.shape
    inner = functools.partial(_experts, expert_fn, local, block)
    for hop in reversed(hops_of(placement, tokens, choices, num_experts)):
        inner = functools.partial(run_hop, hop, inner)
    return inner(params, x_TD, experts_TK, weights_TK, tokens * choices)


def hops_of(placement: ExpertParallel, tokens: int, choices: int, num_experts: int) -> tuple[Hop, ...]:
    """The exchanges that a token goes through on its way to an expert; none for the ring."""
    size, local = placement.size, num_experts // placement.size
    if placement.transport == "ring" or size == 1:
        return ()

    def hop(fan: int, experts: int, groups: tuple[tuple[int, ...], ...] | None = None) -> Hop:
        room = pair_room(placement, tokens, choices, fan)
        return Hop(placement.axis, fan, experts, groups, room, placement.fp8)

    if placement.transport != "two_hop":
        return (hop(size, local),)
    inside = placement.ranks_of_node
    nodes = range(0, size, inside)
    same_place = tuple(tuple(node + place for node in nodes) for place in range(inside))
    same_node = tuple(tuple(range(node, node + inside)) for node in nodes)
    return hop(size // inside, local * inside, same_place), hop(inside, local, same_node)


def _experts(
    expert_fn: ExpertFn,
    experts: int,
    block: int,
    params: Any,
    x_RD: Array,
    idx_RC: Array,
    weights_RC: Array,
    most_pairs: int,
) -> Array:
    return local_experts(
        expert_fn, params, x_RD, idx_RC, weights_RC, experts=experts, block=block, most_pairs=most_pairs
    )
