"""A mesh's communication and a pipeline's waits, from events whose times are known."""

import pytest

from dsv3_jax.train.hlo_text import Instruction
from dsv3_jax.train.mesh_profile import communication, waiting_share
from dsv3_jax.train.trace_events import Event

STEP = "jit(_local_step)/shard_map/"
PROGRAM = {
    name: Instruction(name, opcode, (f"{STEP}{scope}",), 0)
    for name, opcode, scope in (
        ("gather", "all-gather-start", "gather/all_gather"),
        ("f", "custom-call", "gradients/while/body/jvp()/dot_general"),
        ("b", "custom-call", "gradients/while/body/transpose(jvp())/dot_general"),
        ("send", "collective-permute-start", "gradients/while/body/ppermute"),
        ("adam", "fusion", "optimizer/add"),
    )
}


def step(at):
    """1 ms of gathering, then F 2 ms, a message of 3 ms (1 under it), B 4 ms, the optimizer 2 ms after a gap of 1."""
    ms = [
        ("nccl", "gather", 0, 1),
        ("nvjet", "f", 1, 3),
        ("nccl", "send", 2, 5),
        ("nvjet", "b", 5, 9),
        ("loop_fusion", "adam", 10, 12),
    ]
    return [Event(kernel, name, at + 1e3 * begin, at + 1e3 * end) for kernel, name, begin, end in ms]


EVENTS = step(0) + step(12e3)


def test_communication_and_what_nothing_hides_are_counted_by_step():
    total, exposed = communication(EVENTS, PROGRAM, 2)
    assert total == pytest.approx(1 + 3)
    assert exposed == pytest.approx(1 + 2)


def test_messages_beside_each_other_count_once():
    twice = [Event("nccl", "send", 0.0, 2e3), Event("nccl", "gather", 1e3, 3e3), Event("nvjet", "f", 0.0, 4e3)]
    assert communication(twice, PROGRAM, 1) == (pytest.approx(3), 0)


def test_a_device_waits_in_its_pipeline_where_it_computes_nothing():
    # From the first of the gradients to the last: 8 ms, of which F and B compute 6.
    assert waiting_share(EVENTS, PROGRAM) == pytest.approx(2 / 8)


def test_time_outside_the_pipeline_is_no_bubble():
    later = [event._replace(begin=event.begin + 5e4, end=event.end + 5e4) for event in step(0)]
    assert waiting_share(step(0) + later, PROGRAM) == pytest.approx(2 / 8)


def test_steps_without_a_pipeline_wait_for_nothing():
    assert waiting_share([Event("nvjet", "adam", 0.0, 5.0)], PROGRAM) == 0.0
