"""A stack of equal layers inside a stage: run layer by layer, what the backward pass needs kept in rings.

A pass is a loop over as many layers as its stage has, a traced number: none in a tick without such a pass, fewer on
stages that have fewer. So one program serves all ranks and ticks without branches, and all that a pass changes is
carried through its loop, which XLA does in place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from sharding.pipeline.split import Layer

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


class Stack:
    """Layers of one kind; a layer's output is ``(y, cost)``, the cost a scalar that is part of the loss.

    Args:
        layer: one layer in parts.
        slots: layers of the largest stage.
        weights: of all layers that the rank holds, with a leading layer dim, as has ``given``. They may be kept in a
            narrower type than float32, in which a layer sees them and gives their gradients.
        given: see :func:`~sharding.pipeline.split.in_parts`.
        d_cost: what a layer's cost counts in the loss.
    """

    def __init__(self, layer: Layer, slots: int, weights: Any, given: Any, d_cost: Array):
        self._layer, self._slots, self._weights, self._given, self._d_cost = layer, slots, weights, given, d_cost

    def memory(self, record: Any, kept: int, late: int) -> dict[str, Any]:
        """What passes go on from: empty rings, gradients of 0, and ``record`` for what layers report (cost and aux).

        The rings have ``kept`` and ``late`` slots; without any ``late``, passes cannot put off anything.
        """
        return {
            "kept": [ring((kept, self._slots), shape) for shape in self._layer.kept],
            "late": [ring((late, self._slots), shape) for shape in self._layer.deferred] if late else [],
            "grads": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), self._weights),
            "record": record,
        }

    def forward(self, memory: Any, x: Array, ahead: Pass, begin: Number = 0) -> tuple[Any, Array]:
        """``x`` after the layers from number ``begin`` on; what they report is added to the record."""

        def step(i: Number, carry: Any) -> Any:
            memory, x = carry
            return self._ahead(memory, x, ahead, i)

        return lax.fori_loop(begin, ahead.layers, step, (memory, x))

    def through(self, x: Array, ahead: Pass) -> Array:
        """:meth:`forward` for its output alone."""
        return lax.fori_loop(0, ahead.layers, lambda i, x: self._layer.forward(*self._of(ahead.first + i), x)[0][0], x)

    def backward(self, memory: Any, dy: Array, back: Pass, begin: Number = 0) -> tuple[Any, Array]:
        """The input's gradient, the weights' added; the last ``begin`` layers have been gone through."""

        def step(i: Number, carry: Any) -> Any:
            memory, dy = carry
            return self._back(memory, dy, back, i, self._saved(memory, back, i))

        return lax.fori_loop(begin, back.layers, step, (memory, dy))

    def backward_input(self, memory: Any, dy: Array, back: Pass) -> tuple[Any, Array]:
        """:meth:`backward` that puts off what it can of the weights' gradients."""

        def step(i: Number, carry: Any) -> Any:
            memory, dy = carry
            at = back.layers - 1 - i
            saved = self._saved(memory, back, i)
            dx, now, rest = self._layer.backward_input(*self._of(back.first + at), saved, (dy, self._d_cost))
            grads = add(memory["grads"], now, back.first + at)
            return memory | {"grads": grads, "late": put(memory["late"], rest, back.late, at)}, dx

        return lax.fori_loop(0, back.layers, step, (memory, dy))

    def weight_gradient(self, memory: Any, back: Pass) -> Any:
        """What was put off."""

        def step(i: Number, memory: Any) -> Any:
            found = self._layer.weight_gradient(*self._of(back.first + i), take(memory["late"], back.late, i))
            return memory | {"grads": add(memory["grads"], found, back.first + i)}

        return lax.fori_loop(0, back.layers, step, memory)

    def both(
        self, memory: Any, x: Array, dy: Array, ahead: Pass, back: Pass, paired: Bool[Array, ""]
    ) -> tuple[Any, Array, Array]:
        """:meth:`forward` and :meth:`backward`; where they are ``paired``, as many layers as can be go side by side:
        one of each in a turn of one loop, without dependence on each other."""

        def step(i: Number, carry: Any) -> Any:
            memory, x, dy = carry
            # Read before anything is written, lest XLA copy the rings.
            saved, kept = lax.optimization_barrier((self._saved(memory, back, i), memory["kept"]))
            memory, x = self._ahead(memory | {"kept": kept}, x, ahead, i)
            memory, dy = self._back(memory, dy, back, i, saved)
            return memory, x, dy

        turns = jnp.where(paired, jnp.minimum(ahead.layers, back.layers), 0)
        memory, x, dy = lax.fori_loop(0, turns, step, (memory, x, dy))
        memory, x = self.forward(memory, x, ahead, turns)
        memory, dy = self.backward(memory, dy, back, turns)
        return memory, x, dy

    def _of(self, layer: Number) -> tuple[Any, Any]:
        return wide(take(self._weights, layer)), take(self._given, layer)

    def _ahead(self, memory: Any, x: Array, ahead: Pass, i: Number) -> tuple[Any, Array]:
        (x, cost), aux, new = self._layer.forward(*self._of(ahead.first + i), x)
        record = add(memory["record"], (cost, aux), ahead.first + i)
        return memory | {"record": record, "kept": put(memory["kept"], new, ahead.slot, i)}, x

    def _saved(self, memory: Any, back: Pass, i: Number) -> list[Array]:
        return take(memory["kept"], back.slot, back.layers - 1 - i)

    def _back(self, memory: Any, dy: Array, back: Pass, i: Number, saved: list[Array]) -> tuple[Any, Array]:
        layer = back.first + back.layers - 1 - i
        dx, dw = self._layer.backward(*self._of(layer), saved, (dy, self._d_cost))
        return memory | {"grads": add(memory["grads"], dw, layer)}, dx


def when(condition: Bool[Array, ""], change: Callable[[Any], Any], carry: Any) -> Any:
    """``change(carry)`` where the condition holds, else ``carry``, in place: a loop of one turn or none."""
    return lax.fori_loop(0, condition.astype(jnp.int32), lambda _, carry: change(carry), carry)


def wide(weights: Any) -> Any:
    """Weights in float32; where a product narrows them again, XLA does neither."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)


def ring(lead: tuple[int, ...], shape: Any) -> Array:
    """Empty slots."""
    return jnp.zeros((*lead, *shape.shape), shape.dtype)


def take(tree: Any, *index: Number) -> Any:
    """``leaf[index]`` of every array; -1 is the last."""

    def one(leaf: Array) -> Array:
        rest = leaf.shape[len(index) :]
        return lax.dynamic_slice(leaf, (*index, *[0] * len(rest)), (*[1] * len(index), *rest)).reshape(rest)

    return jax.tree.map(one, tree)


def put(tree: Any, values: Any, *index: Number) -> Any:
    """Every array with ``leaf[index]`` replaced."""

    def one(leaf: Array, value: Any) -> Array:
        rest = leaf.shape[len(index) :]
        update = jnp.reshape(value, (*[1] * len(index), *rest))
        return lax.dynamic_update_slice(leaf, update, (*index, *[0] * len(rest)))

    return jax.tree.map(one, tree, values)


def add(tree: Any, values: Any, index: Number) -> Any:
    """Every array with a value added at ``index``; a value that is None adds nothing."""

    def one(value: Any, leaf: Array) -> Array:
        return leaf if value is None else put(leaf, take(leaf, index) + jnp.asarray(value, leaf.dtype), index)

    return jax.tree.map(one, values, tree, is_leaf=lambda value: value is None)
