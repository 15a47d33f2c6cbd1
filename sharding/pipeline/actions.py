"""What a rank of a pipeline does at one time."""

from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """Kinds of action."""

    IDLE = 0
    F = 1
    """A forward pass of one chunk for one micro-batch."""
    B = 2
    """A backward pass with input and weight gradients."""
    BX = 3
    """A backward pass with the input's gradient alone: the weights' is left for a ``W``."""
    W = 4
    """The weight gradient of the oldest ``BX`` that still waits for it."""
    FB = 5
    """A forward pass and a ``B`` of another micro-batch, overlapped."""
    FBX = 6
    """A forward pass and a ``BX`` of another micro-batch, overlapped."""


FORWARD = (Kind.F, Kind.FB, Kind.FBX)
"""Kinds with a forward pass in them."""
BACKWARD = (Kind.B, Kind.BX, Kind.FB, Kind.FBX)
"""Kinds that make the gradient of a chunk's input."""
DEFERRING = (Kind.BX, Kind.FBX)
"""Kinds that leave a weight gradient for later."""


class Action(NamedTuple):
    """One entry of a rank's list. A chunk is one of the parts of the model that the rank holds; -1 is none."""

    kind: Kind
    f_chunk: int = -1
    f_micro: int = -1
    """Chunk and micro-batch of the forward pass."""
    b_chunk: int = -1
    b_micro: int = -1
    """Chunk and micro-batch of the backward pass, or of the weight gradient of a ``W``."""


def forward(chunk: int, micro: int) -> Action:
    """A forward pass alone."""
    return Action(Kind.F, chunk, micro)


def backward(chunk: int, micro: int, *, defer: bool = False) -> Action:
    """A backward pass alone; ``defer`` leaves the weight gradient for later."""
    return Action(Kind.BX if defer else Kind.B, b_chunk=chunk, b_micro=micro)


def weight(chunk: int, micro: int) -> Action:
    """A weight gradient that was left for later."""
    return Action(Kind.W, b_chunk=chunk, b_micro=micro)
