"""Rows of ``dsv3 bench mesh``: meshes, batches that share one reference, micro-batches that fit, refusals."""

import pytest

from dsv3_jax.config import ConfigError, load_config, replace
from dsv3_jax.planning.memory import plan_memory
from dsv3_jax.train.mesh_rows import EVERY, ON_DEMAND, make_rows

BENCH = load_config("bench_3b")


def rows_of(devices, only=(), **how):
    made = make_rows(BENCH, devices, only, **how)
    return {row.name: row for row in made.run}, made.refused


def axes(row):
    mesh = row.config.mesh
    return mesh.pipe, mesh.expert, mesh.data


def test_four_devices_have_every_mesh():
    rows, refused = rows_of(4)
    assert list(rows) == list(EVERY)
    assert refused == {}
    assert axes(rows["expert"]) == (1, 4, 1)
    assert axes(rows["data"]) == (1, 1, 4)
    for name in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        assert axes(rows[name]) == (4, 1, 1)
        assert rows[name].config.mesh.schedule == name
    assert axes(rows["pipe_expert"]) == (2, 2, 1)
    assert {axes(rows[name]) for name in ("one", "one_share", "stages")} == {(1, 1, 1)}
    assert rows["pipe_expert"].what == "pipe = 2, expert = 2, dualpipe, counted"
    assert rows["stages"].what == "one device, as a pipeline of one"


def test_one_process_on_one_device_is_the_reference_of_all_batches():
    rows, _ = rows_of(4)
    flat, piped = 4 * 4, 4 * 4 * 4
    assert rows["one"].trials == (flat, piped)
    assert rows["one"].config.train.batch_size == piped
    for name, row in rows.items():
        assert row.config.train.batch_size == max(row.trials), name
        if name not in ("one", "one_share"):
            assert set(row.trials) <= set(rows["one"].trials), name
    assert rows["one_share"].trials == (4,), "one device's share of the flat batch"


def test_one_rank_shows_what_pairs_of_passes_hide():
    rows, _ = rows_of(2, ["passes", "pairs"], micro_batches=8)
    assert list(rows) == ["one", "passes", "pairs"]
    assert axes(rows["passes"]) == axes(rows["pairs"]) == (1, 2, 1)
    assert rows["pairs"].trials == rows["one"].trials, "a pipeline's batch"
    assert rows["pairs"].what == "expert = 2, counted, passes in pairs"


def test_only_what_is_named_runs_beside_the_reference():
    rows, _ = rows_of(2, ["dualpipev"], micro_batches=4)
    assert list(rows) == ["one", "dualpipev"]
    assert rows["one"].trials == (16,)
    rows, _ = rows_of(4, ["expert_two_hop", "expert_ring"])
    assert [(row.name, row.config.mesh.transport) for row in rows.values()][1:] == [
        ("expert_ring", "ring"),
        ("expert_two_hop", "two_hop"),
    ]


def test_micro_batches_are_halved_until_all_rows_of_a_batch_fit():
    rows, _ = rows_of(4, ["expert", "1f1b"])
    needed = plan_memory(rows["expert"].config).total
    smaller, _ = rows_of(4, ["expert", "1f1b"], memory=needed - 1)
    assert smaller["expert"].config.train.micro_batch_size == 2
    assert smaller["expert"].trials == (8,)
    assert plan_memory(smaller["1f1b"].config).total <= needed - 1
    assert smaller["one"].config.train.micro_batch_size == min(
        row.config.train.micro_batch_size for row in smaller.values()
    )
    assert all(batch % smaller["one"].config.train.micro_batch_size == 0 for batch in smaller["one"].trials)


def test_what_cannot_be_is_a_line_and_the_rest_runs():
    rows, refused = rows_of(3)
    assert set(refused) == {"expert", "dualpipe", "pipe_expert"}
    assert refused["dualpipe"] == "dualpipe needs an even number of devices, not 3: micro-batches enter at both ends"
    assert refused["expert"].startswith("mesh.expert = 3 must divide model.n_routed_experts")
    assert {"data", "1f1b", "dualpipev"} <= set(rows)
    _, refused = rows_of(16)
    assert refused["1f1b"].startswith("mesh.pipe = 16 must be at most the 11")


@pytest.mark.parametrize(
    ("config", "devices", "only", "told"),
    [
        (BENCH, 3, ["dualpipe"], "--only names 'dualpipe': dualpipe needs an even number of devices, not 3"),
        (BENCH, 4, ["dualpip"], "--only names 'dualpip'; the rows are one, expert, .*expert_ring"),
        (BENCH, 2, ["expert_two_hop"], "--only names 'expert_two_hop': two_hop needs 4 devices or more, not 2"),
        (BENCH, 1, [], "a mesh needs 2 devices or more, not 1"),
        (replace(BENCH, mesh={"data": 2}), 2, [], "chooses mesh.pipe, mesh.expert and mesh.data itself"),
    ],
)
def test_a_mistake_is_one_line(config, devices, only, told):
    with pytest.raises(ConfigError, match=told) as raised:
        make_rows(config, devices, only)
    assert "\n" not in str(raised.value)


def test_names_are_told_apart():
    assert len(set(EVERY + ON_DEMAND)) == len(EVERY + ON_DEMAND)
