"""How many copies of tokens travel, by the kind of link: what node-limited routing is for (spec 13.2)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sharding.expert_parallel.placement import ExpertParallel


class Traffic(NamedTuple):
    """Copies of tokens that leave their device in one dispatch; a combine brings as many rows back."""

    between_nodes: int
    within_nodes: int


def count_copies(experts_NTK: Int[np.ndarray, "N T K"], num_experts: int, placement: ExpertParallel) -> Traffic:
    """Copies sent by all N ranks, one for each (token, destination) at every hop; unused room is not counted.

    Args:
        experts_NTK: chosen experts of each rank's T tokens.
        num_experts: E of all ranks.
        placement: ranks, their nodes and the transport: ``two_hop`` or one of the one-hop forms.

    Raises:
        ValueError: the ring, which sends every token everywhere; or another number of ranks.
    """
    size, per_node = placement.size, placement.ranks_of_node
    if placement.transport == "ring" or experts_NTK.shape[0] != size:
        raise ValueError(f"no copies to count: {experts_NTK.shape[0]} ranks' tokens, {placement}")
    wanted_NTR = np.any(experts_NTK[..., None] // (num_experts // size) == np.arange(size), axis=2)
    source = np.arange(size)
    other_rank_NR = source[:, None] != source
    other_node_NR = source[:, None] // per_node != source // per_node
    copies_NR = wanted_NTR.sum(axis=1)
    if placement.transport != "two_hop":
        between = int(copies_NR[other_node_NR].sum())
        return Traffic(between, int(copies_NR[other_rank_NR].sum()) - between)
    to_node_NA = wanted_NTR.reshape(*wanted_NTR.shape[:2], -1, per_node).any(axis=3).sum(axis=1)
    other_node_NA = source[:, None] // per_node != np.arange(size // per_node)
    other_place_NR = source[:, None] % per_node != source % per_node
    return Traffic(int(to_node_NA[other_node_NA].sum()), int(copies_NR[other_place_NR].sum()))
