"""One copy of a token for each destination that it needs, and the slots that copies travel in."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.permute import Plan


class Copies(NamedTuple):
    """Copies of T tokens for n destinations, one for each (token, destination) however many choices it serves.

    A token has ``X = min(K, n)`` columns; in an unused one the destination is n. Sorted, copies lie by destination and
    in token order within one.
    """

    destination_TX: Int[Array, "T X"]
    round_TX: Int[Array, "T X"]
    """The round of the exchange that takes the copy."""
    rounds: Int[Array, ""]
    """Rounds that these copies need, at least 1."""
    start_n: Int[Array, "n1"]
    """Place of each destination's first copy among the sorted ones, and the number of copies."""
    column_P: Int[Array, "P"]
    """Sorted copies: the flat index ``t * X + column``."""
    place_TX: Int[Array, "T X"]
    """The inverse of ``column_P``."""


def find_copies(idx_TK: Int[Array, "T K"], destinations: int, experts: int, room: int = 0) -> Copies:
    """Which destinations T tokens need, and in which round each copy goes.

    Args:
        idx_TK: chosen experts; ``destinations * experts`` is no choice.
        destinations: n.
        experts: experts that one destination owns.
        room: a destination's round is full when the choices of its copies reach it; 0: one round takes all.
    """
    wanted_TK = (idx_TK // experts).astype(jnp.int32)
    if destinations <= idx_TK.shape[1]:
        served_TKX = wanted_TK[:, :, None] == jnp.arange(destinations)
        pairs_TX = jnp.sum(served_TKX, axis=1, dtype=jnp.int32)
        destination_TX = jnp.where(pairs_TX > 0, jnp.arange(destinations, dtype=jnp.int32), destinations)
    else:
        same_TKX = wanted_TK[:, :, None] == wanted_TK[:, None, :]
        pairs_TX = jnp.sum(same_TKX, axis=1, dtype=jnp.int32)
        destination_TX = jnp.where(jnp.any(jnp.triu(same_TKX, 1), axis=1), destinations, wanted_TK)

    destination_P = destination_TX.reshape(-1)
    column_P = jnp.argsort(destination_P, stable=True).astype(jnp.int32)
    start_n = jnp.searchsorted(destination_P[column_P], jnp.arange(destinations + 1, dtype=jnp.int32))
    numbers_P = jnp.arange(destination_P.size, dtype=jnp.int32)
    place_TX = jnp.zeros_like(destination_P).at[column_P].set(numbers_P, unique_indices=True)
    place_TX = place_TX.reshape(destination_TX.shape)

    if room:
        pairs_P = pairs_TX.reshape(-1)[column_P]
        before_P = jnp.cumsum(pairs_P) - pairs_P
        first_n = before_P.at[start_n].get(mode="clip")
        round_TX = (before_P[place_TX] - first_n[destination_TX]) // room
        round_TX = jnp.where(destination_TX < destinations, round_TX, 0)
    else:
        round_TX = jnp.zeros_like(destination_TX)
    return Copies(destination_TX, round_TX, jnp.max(round_TX) + 1, start_n.astype(jnp.int32), column_P, place_TX)


def slots_of_round(copies: Copies, turn: Int[Array, ""] | int, slots: int) -> Plan:
    """The copies of one round as a plan of one block of ``slots`` rows for each destination.

    The caller promises that no destination's round has more than ``slots`` copies, as rounds of a ``room`` of at most
    ``slots`` have not.
    """
    columns, destinations = copies.column_P.size, copies.start_n.size - 1
    going_TXn = copies.destination_TX[:, :, None] == jnp.arange(destinations)
    round_TX1 = copies.round_TX[:, :, None]
    begin_n = copies.start_n[:-1] + jnp.sum(going_TXn & (round_TX1 < turn), axis=(0, 1), dtype=jnp.int32)
    counts_n = jnp.sum(going_TXn & (round_TX1 == turn), axis=(0, 1), dtype=jnp.int32)

    slot_C = jnp.arange(slots, dtype=jnp.int32)
    column_nC = copies.column_P.at[begin_n[:, None] + slot_C].get(mode="clip")
    column_nC = jnp.where(slot_C < counts_n[:, None], column_nC, columns)

    going_TX = (copies.destination_TX < destinations) & (copies.round_TX == turn)
    slot_TX = copies.destination_TX * slots + copies.place_TX - begin_n[copies.destination_TX]
    return Plan(
        counts_E=counts_n,
        group_of_block=jnp.arange(destinations, dtype=jnp.int32),
        pair_of_row_M=column_nC.reshape(-1),
        row_of_pair_TK=jnp.where(going_TX, slot_TX, destinations * slots),
        num_blocks=jnp.asarray(destinations, jnp.int32),
        block=slots,
    )
