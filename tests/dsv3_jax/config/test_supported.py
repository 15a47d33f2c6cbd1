"""What runs there are: every combination but those that the design excludes, each of these with a reason."""

import itertools
from typing import Any

import pytest

from dsv3_jax.config import replace, supported
from tests.dsv3_jax import micro

MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (3, 2, 1), (4, 2, 1), (4, 1, 2), (8, 1, 1)]
SCHEDULES = ("gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev")
TRANSPORTS = ("padded", "counted", "ring", "two_hop")
CONFIG = micro.config(micro.V3 | {"num_hidden_layers": 9}, train={"micro_batch_size": 1, "batch_size": 48})


def excluded(pipe, expert, data, schedule, transport):
    """Design section 5."""
    micro_batches = 48 // (expert * data)
    odd = schedule == "dualpipe" and (pipe % 2 or micro_batches % 2)
    few = schedule in ("dualpipe", "dualpipev") and micro_batches < 2 * pipe
    return (pipe > 1 and (odd or few)) or (transport == "two_hop" and 1 < expert < 4)


def test_every_combination_runs_but_those_that_the_design_excludes():
    count = 0
    for (pipe, expert, data), schedule, transport in itertools.product(MESHES, SCHEDULES, TRANSPORTS):
        mesh: dict[str, Any] = {"pipe": pipe, "expert": expert, "data": data, "schedule": schedule}
        for precision, unroll, lag in itertools.product(("fp32", "bf16", "fp8"), (False, True), (1, 2)):
            mesh |= {"transport": transport, "lag": lag}
            config = replace(CONFIG, mesh=mesh, train={"precision": precision, "unroll": unroll})
            reason = supported(config)
            assert bool(reason) == bool(excluded(pipe, expert, data, schedule, transport)), (mesh, reason)
            assert reason is None or ("mesh." in reason and "\n" not in reason)
            count += reason is None
    assert count > 1000


@pytest.mark.parametrize("pipe", [1, 2])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(("field", "value"), [("lag", 3), ("lag", 0), ("waiting", -2)])
def test_ticks_and_waiting_gradients_that_cannot_be_are_told_whatever_the_pipe(pipe, trainable, field, value):
    mesh: dict[str, Any] = {"pipe": pipe, field: value}
    reason = supported(replace(CONFIG, mesh=mesh), trainable=trainable)
    assert reason is not None
    assert reason.startswith(f"mesh.{field} = {value} must be ")
