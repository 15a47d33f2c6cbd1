"""How a pass goes through the layers of a stage: by a loop that serves all of them, or by each of them apart.

Passes are traced: a rank may have one in a tick or not, of any of its stages, and stages differ in their layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

Number = Int[Array, ""] | int


class Pass(NamedTuple):
    """One pass through a stage's layers."""

    first: Number
    """Of all layers that the rank holds, the stage's first."""
    layers: Number
    """How many layers; 0: there is no such pass in this tick."""
    slot: Number
    """Of the ring of what is kept for the backward pass."""
    late: Number = -1
    """Slot of the ring of weight gradients put off."""


Step = Callable[[Pass, Any, Any], Any]
"""``(pass, i, carry) -> carry``: through the stage's layer ``i``."""
Pair = Callable[[Pass, Any, Pass, Any, Any], Any]
"""``(ahead, i, back, j, carry) -> carry``: forward through one layer and backward through another."""


class Loop:
    """A loop of as many turns as the stage has layers: none where there is no such pass."""

    def up(self, step: Step, of: Pass, carry: Any, begin: Number = 0) -> Any:
        """From layer ``begin`` to the last."""
        return lax.fori_loop(begin, of.layers, lambda i, carry: step(of, i, carry), carry)

    def down(self, step: Step, of: Pass, carry: Any, begin: Number = 0) -> Any:
        """From the last layer, or ``begin`` layers before it, to the first."""
        return lax.fori_loop(begin, of.layers, lambda i, carry: step(of, of.layers - 1 - i, carry), carry)

    def both(
        self, up: Step, down: Step, pair: Pair, ahead: Pass, back: Pass, paired: Bool[Array, ""], carry: Any
    ) -> Any:
        """:meth:`up` and :meth:`down`; where they are ``paired``, one layer of each in a turn of one loop, as long as
        both have layers."""
        turns = jnp.where(paired, jnp.minimum(ahead.layers, back.layers), 0)
        carry = lax.fori_loop(0, turns, lambda i, c: pair(ahead, i, back, back.layers - 1 - i, c), carry)
        return self.down(down, back, self.up(up, ahead, carry, turns), turns)


class Apart:
    """Every layer by itself in the program, with its number known. Layers that all stages have stand together.

    Args:
        held: layers that a rank has room for, those of one stage after those of another.
        slots: layers of the largest stage.
        least: layers of the smallest.
    """

    def __init__(self, held: int, slots: int, least: int):
        self._held, self._firsts = held, range(0, held, slots)
        self._all, self._some = range(least), range(least, slots)

    def up(self, step: Step, of: Pass, carry: Any) -> Any:
        """Through all layers."""
        for first in self._firsts:
            carry = self._together(step, of, first, self._all, of.layers > 0, carry)
            carry = self._one_by_one(step, of, first, self._some, carry)
        return carry

    def down(self, step: Step, of: Pass, carry: Any) -> Any:
        """Through all layers, from the last."""
        for first in self._firsts:
            carry = self._one_by_one(step, of, first, self._some[::-1], carry)
            carry = self._together(step, of, first, self._all[::-1], of.layers > 0, carry)
        return carry

    def both(
        self, up: Step, down: Step, pair: Pair, ahead: Pass, back: Pass, paired: Bool[Array, ""], carry: Any
    ) -> Any:
        """:meth:`up` and :meth:`down`; where they are ``paired``, layers that all stages have go by twos.

        Two paired passes are of two stages where a rank holds two.
        """
        for first in self._firsts:
            carry = self._one_by_one(down, back, first, self._some[::-1], carry)
        for first, other in zip(self._firsts, self._firsts[::-1], strict=True):

            def by_twos(carry: Any, first: int = first, other: int = other) -> Any:
                for i, j in zip(self._all, self._all[::-1], strict=True):
                    carry = pair(ahead._replace(first=first), i, back._replace(first=other), j, carry)
                return carry

            carry = when(paired & (ahead.first == first), by_twos, carry)
        for first in self._firsts:
            carry = self._together(up, ahead, first, self._all, (ahead.layers > 0) & ~paired, carry)
            carry = self._together(down, back, first, self._all[::-1], (back.layers > 0) & ~paired, carry)
        for first in self._firsts:
            carry = self._one_by_one(up, ahead, first, self._some, carry)
        return carry

    def _together(self, step: Step, of: Pass, first: int, layers: range, there: Any, carry: Any) -> Any:
        def run(carry: Any) -> Any:
            for i in layers:
                carry = step(of._replace(first=first), i, carry)
            return carry

        return when(there & (of.first == first), run, carry) if layers else carry

    def _one_by_one(self, step: Step, of: Pass, first: int, layers: range, carry: Any) -> Any:
        for i in layers:
            if first + i < self._held:  # Without a mesh of stages there is no room behind the last one's layers.
                carry = self._together(step, of, first, range(i, i + 1), of.layers > i, carry)
        return carry


def when(condition: Bool[Array, ""], change: Callable[[Any], Any], carry: Any) -> Any:
    """``change(carry)`` where the condition holds, else ``carry``, in place: a loop of one turn or none."""
    return lax.fori_loop(0, condition.astype(jnp.int32), lambda _, carry: change(carry), carry)
