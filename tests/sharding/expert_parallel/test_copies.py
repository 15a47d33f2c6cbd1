"""Copies, rounds and slots against plain loops; copies that really travel against their count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from sharding.expert_parallel import ExpertParallel, Traffic, count_copies, routed
from sharding.expert_parallel import hop as hop_room
from sharding.expert_parallel.copies import find_copies, slots_of_round
from sharding.mesh import make_mesh
from tests.sharding.expert_parallel.layer import EXPERTS, TOKENS, draw, expert_fn, routings

ROOM = 4


@functools.partial(jax.jit, static_argnums=(2, 3))
def all_slots(idx, turns, destinations, experts):
    copies = find_copies(idx, destinations, experts, ROOM)

    def slots(turn):
        plan = slots_of_round(copies, turn, ROOM)
        return plan.token_of_row_M, plan.row_of_pair_TK, plan.counts_E

    return copies, *jax.vmap(slots)(turns)


@pytest.mark.parametrize("destinations", [2, 8], ids=["fewer destinations than choices", "more"])
@pytest.mark.parametrize("name", routings())
def test_every_copy_goes_in_one_round_in_order_and_within_its_room(name, destinations):
    idx = routings()[name][:17].copy()
    idx[3], idx[9, 1] = 8, 8  # no choice at all, one choice fewer
    experts = 8 // destinations
    turns = np.arange(60)
    copies, tokens, rows, counts = all_slots(jnp.asarray(idx), turns, destinations, experts)
    tokens = np.asarray(tokens).reshape(60, destinations, ROOM)

    columns = min(idx.shape[1], experts)
    most = 1
    for destination in range(destinations):
        served = (idx // experts == destination).sum(axis=1)
        per_round = [turn[turn < len(idx)] for turn in tokens[:, destination]]
        np.testing.assert_array_equal(np.concatenate(per_round), np.flatnonzero(served))
        np.testing.assert_array_equal([len(sent) for sent in per_round], counts[:, destination])
        assert all(served[sent].sum() <= ROOM + columns - 1 for sent in per_round)
        used = [turn for turn, sent in enumerate(per_round) if len(sent)]
        assert used == list(range(len(used)))
        most = max(most, len(used))
    assert int(copies.rounds) == most

    # the way back: each copy's slot, in its round alone
    turn, token, column = np.nonzero(np.asarray(rows) < destinations * ROOM)
    slot = np.asarray(rows)[turn, token, column]
    np.testing.assert_array_equal(tokens.reshape(60, -1)[turn, slot], token)
    assert len(turn) == sum((idx // experts == d).any(axis=1).sum() for d in range(destinations))


def travelling_copies(monkeypatch, placement, experts):
    """Rows that are not empty in every dispatch, from and to each rank, as the program sends them."""
    sent, calls = {}, []
    plain = hop_room.exchange
    size = 16

    def counting(hop, rows):
        if rows.shape[1] == size:
            calls.append(hop)
            number = len(calls)
            full = jnp.sum(jnp.any(rows.reshape(hop.fan, -1, size) != 0, axis=2), axis=1)
            jax.debug.callback(
                lambda rank, full, number=number: sent.__setitem__((number, int(rank)), np.asarray(full)),
                lax.axis_index(placement.axis),
                full,
            )
        return plain(hop, rows)

    monkeypatch.setattr(hop_room, "exchange", counting)
    x, weights, params, _ = draw(size)
    run = functools.partial(routed, expert_fn=expert_fn, num_experts=EXPERTS, block=4, placement=placement)
    spec = P("expert")
    layer = jax.shard_map(run, mesh=make_mesh(expert=8), in_specs=(spec,) * 4, out_specs=spec, check_vma=False)
    jax.block_until_ready(jax.jit(layer)(x, experts, weights, params))
    jax.effects_barrier()
    between = within = 0
    for number, hop in enumerate(calls[: len(calls) // 2], start=1):  # the other half are the sums on their way back
        for rank in range(8):
            group = next(group for group in hop.groups or (tuple(range(8)),) if rank in group)
            for to, copies in zip(group, sent[number, rank], strict=True):
                if to != rank:
                    same_node = to // placement.ranks_of_node == rank // placement.ranks_of_node
                    within, between = within + copies * same_node, between + copies * (not same_node)
    return Traffic(between, within)


def test_two_hops_send_fewer_copies_between_nodes_and_as_many_as_counted(monkeypatch):
    experts = routings()["uniform"]
    per_rank = experts.reshape(8, TOKENS, -1)
    found = {}
    for transport in ("padded", "two_hop"):
        placement = ExpertParallel(8, transport, capacity=0.0, node_size=4)
        with monkeypatch.context() as patch:
            found[transport] = travelling_copies(patch, placement, experts)
        assert found[transport] == count_copies(per_rank, EXPERTS, placement)
    tokens = range(len(experts))
    node_of = experts // 4
    assert found["two_hop"].between_nodes == sum((node_of[t] != t // (4 * TOKENS)).any() for t in tokens)
    assert found["two_hop"].between_nodes < 0.7 * found["padded"].between_nodes


def test_copies_are_counted_as_by_hand():
    # two nodes of two ranks, an expert each; rank 0's token wants ranks 0, 2, 3, rank 3's token ranks 0 and 1
    experts = np.array([[[0, 2, 3]], [[1, 1, 1]], [[2, 2, 2]], [[0, 1, 1]]])
    assert count_copies(experts, 4, ExpertParallel(4, "padded")) == Traffic(between_nodes=4, within_nodes=0)
    assert count_copies(experts, 4, ExpertParallel(4, "two_hop")) == Traffic(between_nodes=2, within_nodes=2)
    with pytest.raises(ValueError, match="no copies to count"):
        count_copies(experts, 4, ExpertParallel(4, "ring"))
