"""Who runs, who waits, who is set aside; no model is needed to know."""

import pytest

from dsv3_jax.inference.block_manager import BlockManager
from dsv3_jax.inference.scheduler import Scheduler
from dsv3_jax.inference.sequence import Sampling, Sequence


def made(pages=32, **how):
    how = {"max_batch": 4, "token_budget": 16, "chunk": 8, "reach": 2} | how
    return Scheduler(BlockManager(pages, 4, sharing=False), **how)


def request(length, new=8):
    return Sequence(list(range(length)), Sampling(new), length + new, ())


def go(scheduler, plan):
    """As the engine does, each sequence writing one token."""
    for chunk in plan.prefill:
        chunk.sequence.computed = chunk.stop
    for sequence in plan.decode:
        sequence.tokens.append(1)
        sequence.computed = len(sequence.tokens) - 1
        if len(sequence.tokens) >= sequence.end:
            scheduler.remove(sequence)


def test_a_long_prompt_is_read_in_chunks_and_writes_behind_the_last():
    scheduler = made()
    scheduler.add(sequence := request(20))
    spans = []
    for _ in range(4):
        plan = scheduler.plan()
        spans.append([(chunk.start, chunk.stop) for chunk in plan.prefill])
        wrote = sequence in plan.decode
        go(scheduler, plan)
    assert spans == [[(0, 8)], [(8, 16)], [(16, 19)], []]
    assert wrote


def test_the_budget_is_kept_and_those_who_write_come_first():
    scheduler = made(token_budget=10)
    for length in (9, 9, 9):
        scheduler.add(request(length))
    seen = []
    for _ in range(5):
        plan = scheduler.plan()
        computed = len(plan.decode) + sum(chunk.stop - chunk.start for chunk in plan.prefill)
        assert computed <= 10
        seen.append((len(plan.decode), computed))
        go(scheduler, plan)
    assert seen == [(0, 10), (1, 10), (2, 7), (3, 3), (3, 3)]


def test_no_more_run_than_there_are_slots_and_each_has_its_own():
    scheduler = made(max_batch=2)
    for _ in range(5):
        scheduler.add(request(2))
    while scheduler.running or scheduler.waiting:
        go(scheduler, scheduler.plan())
        assert len(scheduler.running) <= 2
        assert len({sequence.slot for sequence in scheduler.running}) == len(scheduler.running)
    assert scheduler.blocks.held == 0


def test_the_youngest_is_set_aside_and_comes_back_before_those_behind_it():
    scheduler = made(pages=9, reach=4)
    old, young, last = (request(9, new=12) for _ in range(3))
    for sequence in (old, young, last):
        scheduler.add(sequence)
    aside, finished = [], []
    for _ in range(200):
        plan = scheduler.plan()
        aside += plan.preempted
        assert all(sequence.pages == [] for sequence in plan.preempted)
        before = [*scheduler.running]
        go(scheduler, plan)
        finished += [sequence for sequence in before if sequence not in scheduler.running]
        if not (scheduler.running or scheduler.waiting):
            break
    assert aside
    assert old not in aside
    assert finished == [old, young, last]
    assert scheduler.blocks.held == 0


def test_one_that_needs_all_pages_gets_them():
    scheduler = made(pages=6, reach=8)
    small, large = request(2, new=4), request(12, new=8)
    scheduler.add(small)
    scheduler.add(large)
    for _ in range(60):
        go(scheduler, scheduler.plan())
    assert (len(small.tokens), len(large.tokens)) == (6, 20)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_request_can_leave_at_any_time(steps):
    scheduler = made()
    requests = [request(9) for _ in range(6)]
    for sequence in requests:
        scheduler.add(sequence)
    for _ in range(steps):
        go(scheduler, scheduler.plan())
    for sequence in requests:
        scheduler.remove(sequence)
    assert scheduler.blocks.held == 0
    assert not scheduler.running
    assert not scheduler.waiting
