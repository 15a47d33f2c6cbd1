"""Orders of the schedules that go through the ranks one way, one chunk a rank: GPipe, 1F1B and ZB1P."""

from sharding.pipeline.actions import Action, backward, forward, weight


def gpipe(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """All forward passes, then all backward passes, the last micro-batch first."""
    del rank, ranks  # All do the same.
    return [forward(0, i) for i in range(micro_batches)] + [backward(0, i) for i in reversed(range(micro_batches))]


def one_f_one_b(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """As many forward passes as ranks come after this one, then forward and backward by turns, then what is left."""
    ahead = min(ranks - rank - 1, micro_batches)
    actions = [forward(0, i) for i in range(ahead)]
    for i in range(micro_batches):
        if ahead + i < micro_batches:
            actions.append(forward(0, ahead + i))
        actions.append(backward(0, i))
    return actions


def zb1p(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """1F1B whose weight gradients come as many micro-batches late as ranks come before this one.

    A rank starts ``rank`` forward passes later than the first one, and fills the same time at the end with what it put
    off; passes under way and gradients put off are together as many as 1F1B's first rank has passes (spec 13.1).
    """
    late = min(rank, micro_batches)
    ahead = min(ranks - rank - 1, micro_batches)
    actions = [forward(0, i) for i in range(ahead)]
    for i in range(micro_batches):
        if ahead + i < micro_batches:
            actions.append(forward(0, ahead + i))
        actions.append(backward(0, i, defer=True))
        if i >= late:
            actions.append(weight(0, i - late))
    return actions + [weight(0, i) for i in range(micro_batches - late, micro_batches)]
