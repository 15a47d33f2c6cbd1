"""One copy of a token for each destination that it needs, and the slots that copies travel in."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.permute import Plan, make_plan


class Copies(NamedTuple):
    """Copies of T tokens for n destinations, one for each (token, destination) however many choices it serves.

    A token has ``X = min(K, n)`` columns; in an unused one the destination is n.
    """

    destination_TX: Int[Array, "T X"]
    round_TX: Int[Array, "T X"]
    """The round of the exchange that takes the copy."""
    rounds: Int[Array, ""]
    """Rounds that these copies need, at least 1."""
    order: Plan
    """Copies sorted by destination, in token order within one; blocks of one row."""


def find_copies(idx_TK: Int[Array, "T K"], destinations: int, experts: int, room: int = 0) -> Copies:
    """Which destinations T tokens need, and in which round each copy goes.

    Args:
        idx_TK: chosen experts; ``destinations * experts`` is no choice.
        destinations: n.
        experts: experts that one destination owns.
        room: a destination's round is full when the choices of its copies reach it; 0: one round takes all.
    """
    wanted_TK = idx_TK // experts
    if destinations <= idx_TK.shape[1]:
        served_TKX = wanted_TK[:, :, None] == jnp.arange(destinations)
        pairs_TX = jnp.sum(served_TKX, axis=1, dtype=jnp.int32)
        destination_TX = jnp.where(pairs_TX > 0, jnp.arange(destinations), destinations)
    else:
        same_TKX = wanted_TK[:, :, None] == wanted_TK[:, None, :]
        pairs_TX = jnp.sum(same_TKX, axis=1, dtype=jnp.int32)
        seen_TX = jnp.any(jnp.triu(same_TKX, 1), axis=1)
        destination_TX = jnp.where(seen_TX, destinations, wanted_TK)
    destination_TX = destination_TX.astype(jnp.int32)
    order = make_plan(destination_TX, destinations, 1)
    if not room:
        return Copies(destination_TX, jnp.zeros_like(destination_TX), jnp.ones((), jnp.int32), order)
    pairs_P = pairs_TX.reshape(-1).at[order.pair_of_row_M].get(mode="fill", fill_value=0)
    before_P = jnp.cumsum(pairs_P) - pairs_P
    first_n = jnp.append(before_P, 0)[_starts(order)]
    safe_TX = jnp.minimum(destination_TX, destinations - 1)
    before_TX = before_P.at[order.row_of_pair_TK].get(mode="fill", fill_value=0) - first_n[safe_TX]
    round_TX = jnp.where(destination_TX < destinations, before_TX // room, 0)
    return Copies(destination_TX, round_TX, jnp.max(round_TX) + 1, order)


def slots_of_round(copies: Copies, turn: Int[Array, ""] | int, slots: int) -> Plan:
    """The copies of one round as a plan of one block of ``slots`` rows for each destination.

    The caller promises that no destination's round has more than ``slots`` copies, as rounds of a ``room`` of at most
    ``slots`` have not.
    """
    order, start_n = copies.order, _starts(copies.order)
    destinations, pairs = start_n.shape[0], copies.round_TX.size
    round_P = copies.round_TX.reshape(-1).at[order.pair_of_row_M].get(mode="fill", fill_value=0)
    end_n = start_n + order.counts_E
    earlier_P = jnp.append(0, jnp.cumsum(round_P < turn))
    begin_n = start_n + earlier_P[end_n] - earlier_P[start_n]
    same_P = jnp.append(0, jnp.cumsum(round_P == turn))
    counts_n = same_P[end_n] - same_P[start_n]

    place_M = jnp.tile(jnp.arange(slots, dtype=jnp.int32), destinations)
    row_M = jnp.minimum(jnp.repeat(begin_n, slots) + place_M, pairs - 1)
    pair_of_row_M = jnp.where(place_M < jnp.repeat(counts_n, slots), order.pair_of_row_M[row_M], pairs)

    going_TX = (copies.destination_TX < destinations) & (copies.round_TX == turn)
    safe_TX = jnp.minimum(copies.destination_TX, destinations - 1)
    slot_TX = safe_TX * slots + order.row_of_pair_TK - begin_n[safe_TX]
    return Plan(
        counts_E=counts_n,
        group_of_block=jnp.arange(destinations, dtype=jnp.int32),
        pair_of_row_M=pair_of_row_M,
        row_of_pair_TK=jnp.where(going_TX, slot_TX, destinations * slots),
        num_blocks=jnp.asarray(destinations, jnp.int32),
        block=slots,
    )


def _starts(order: Plan) -> Array:
    return jnp.cumsum(order.counts_E) - order.counts_E
