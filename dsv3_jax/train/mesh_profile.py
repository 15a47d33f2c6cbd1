"""What a profile of a mesh's steps tells of one device: its communication, and how long it waits in a pipeline."""

import re
from collections.abc import Iterator, Mapping, Sequence

from dsv3_jax.train.hlo_text import Instruction
from dsv3_jax.train.step_table import COMMUNICATION, kind_of
from dsv3_jax.train.trace_events import Event, share_out

_SCOPE = re.compile(r"\b(gradients|optimizer)\b")


def communication(events: Sequence[Event], program: Mapping[str, Instruction], steps: int) -> tuple[float, float]:
    """Milliseconds a step in which a device communicates, and of these the ones in which it does nothing else."""
    between = [event for event in events if _communicates(event, program)]
    total = share_out(between, lambda event: False).spent.values()
    alone = [
        microseconds
        for place, microseconds in share_out(events, lambda event: _communicates(event, program)).spent.items()
        if _communicates(events[place], program)
    ]
    return sum(total) / steps / 1e3, sum(alone) / steps / 1e3


def waiting_share(events: Sequence[Event], program: Mapping[str, Instruction]) -> float:
    """Share of a pipeline's time in which a device computes nothing: it waits for others, for messages or for the host.

    The pipeline's time is, in every step, from the first operation of the step's gradients to the last one before the
    optimizer.
    """
    spent = share_out(events, lambda event: _communicates(event, program)).spent
    busy = whole = 0.0
    for begin, end in _pipelines(events, program):
        whole += end - begin
        busy += sum(
            microseconds
            for place, microseconds in spent.items()
            if begin <= events[place].begin < end and not _communicates(events[place], program)
        )
    return 1 - busy / whole if whole else 0.0


def _pipelines(events: Sequence[Event], program: Mapping[str, Instruction]) -> Iterator[tuple[float, float]]:
    """Begin and end of every step's gradients."""
    begin = end = None
    for event in events:
        instruction = program.get(event.instruction)
        own = instruction.op_names[0] if instruction and instruction.op_names else ""
        scope = _SCOPE.search(own)
        if scope and scope[1] == "gradients":
            begin, end = event.begin if begin is None else begin, max(end or 0.0, event.end)
        elif scope and begin is not None and end is not None and event.begin >= end:
            yield begin, end
            begin = end = None
    if begin is not None and end is not None:
        yield begin, end


def _communicates(event: Event, program: Mapping[str, Instruction]) -> bool:
    return kind_of(event, program.get(event.instruction)) == COMMUNICATION
