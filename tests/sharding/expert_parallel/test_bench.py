"""The transports' bench: what it counts, and every program of it on a few tokens."""

import json
import math

import numpy as np
import pytest

from sharding.expert_parallel import ExpertParallel, hops_of
from sharding.expert_parallel.bench import Shapes, bench, measure, nvlink, received_rows, useful_bytes, wire_bytes
from sharding.mesh import make_mesh

SMALL = Shapes(tokens=24, hidden=256, experts=8, choices=2)
V3 = Shapes()
ROW = {"round_trip_us": 90.0} | {
    f"{name}_{key}": value
    for name in ("dispatch", "combine")
    for key, value in {"us": 40.0, "gbs": 100.0, "of_deepep": 0.65, "wire_gbs": 120.0, "of_nvlink": None}.items()
}


def test_a_row_is_a_token_and_a_rank_whatever_the_choices():
    idx = np.asarray([[[0, 1], [0, 2]], [[2, 3], [3, 1]]])
    assert received_rows(idx, 4) == (3 + 3) / 2, "rank 0 gets three tokens, one of them from itself twice chosen"


def test_bytes_are_those_of_deepep():
    """Its published 153 GB/s for eight ranks: some 21,500 rows of 7,392 bytes in about a millisecond."""
    idx = np.stack(
        [np.random.default_rng(rank).permuted(np.tile(np.arange(256), (4096, 1)), axis=1) for rank in range(8)]
    )
    rows = received_rows(idx[..., :8], 256)
    expected = 8 * 4096 * (1 - math.comb(224, 8) / math.comb(256, 8))
    assert rows == pytest.approx(expected, rel=0.01)
    bytes_ = useful_bytes(rows, V3)
    assert bytes_["dispatch"] == rows * (7168 + 4 * 56)
    assert bytes_["combine"] == rows * 2 * 7168
    assert 1e-3 < bytes_["dispatch"] / 153e9 < 1.1e-3


def test_the_wire_has_the_slots_of_every_other_rank():
    tokens, there, back = V3.tokens, 7168 + 56, 2 * 7168
    one_hop = wire_bytes(ExpertParallel(8, "padded", fp8=True), V3)
    assert one_hop == {"dispatch": 7 * tokens * there, "combine": 7 * tokens * back}
    # To another node, then to three others of one's own with what came.
    two = ExpertParallel(8, "two_hop", node_size=4, fp8=True)
    assert [hop.fan for hop in hops_of(two, tokens, 8, 256)] == [2, 4]
    assert wire_bytes(two, V3)["dispatch"] == (1 * tokens + 3 * 2 * tokens) * there
    ring = wire_bytes(ExpertParallel(8, "ring", fp8=True), V3)
    assert ring == {"dispatch": 7 * tokens * there, "combine": 8 * tokens * back}


@pytest.mark.parametrize(
    ("kind", "rate"), [("NVIDIA H200", 450), ("NVIDIA H800", 200), ("NVIDIA H100 PCIe", None), ("cpu", None)]
)
def test_nvlinks_rate_is_the_data_sheets(kind, rate):
    assert nvlink(kind) == rate


@pytest.mark.parametrize(
    "transports", [["ring"], pytest.param(["padded", "counted", "two_hop"], marks=pytest.mark.slow)]
)
def test_transports_bring_tokens_back_and_are_timed(tmp_path, transports):
    out = tmp_path / "rows.json"
    rows = bench(SMALL, 4, transports, json_path=out, seconds=0.001)
    assert [row["transport"] for row in rows] == transports
    assert json.loads(out.read_text()) == rows
    for row in rows:
        # One or two roundings to e4m3.
        assert 0 < row["round_trip_error"] < 0.05
        assert row["combine_error"] < 0.05
        assert all(row[f"{name}_us"] > 0 for name in ("dispatch", "combine", "round_trip"))
        assert row["dispatch_gbs"] == pytest.approx(row["rows_received"] * (256 + 8) / row["dispatch_us"] / 1e3)
        assert ("exchange_there_us" in row) == (row["transport"] != "ring")


def test_too_little_room_is_told_not_timed():
    with pytest.raises(ValueError, match=r"counted needs \d+ rounds with capacity 0.2: raise it"):
        measure("counted", SMALL, make_mesh(expert=4), capacity=0.2, seconds=0.001)


def test_one_that_cannot_run_ends_nothing(capsys, monkeypatch):
    def some(transport, *given, **how):
        return ROW | {"transport": transport} if transport == "padded" else measure(transport, *given, **how)

    monkeypatch.setattr("sharding.expert_parallel.bench.measure", some)
    rows = bench(SMALL, 2, ["two_hop", "padded"])
    assert [row["transport"] for row in rows] == ["padded"]
    printed = capsys.readouterr().out
    assert "two_hop failed: ValueError: transport 'two_hop' needs expert >= 4" in printed
    assert "padded    dispatch      40.0 us    100 GB/s (0.65 of DeepEP's)" in printed
