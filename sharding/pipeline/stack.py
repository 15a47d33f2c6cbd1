"""A stack of equal layers inside a stage, what the backward pass needs kept in rings.

A pass goes through as many layers as its stage has, a traced number: none in a tick without such a pass, fewer on
stages that have fewer. So one program serves all ranks and ticks without branches, and all that a pass changes is
carried through its loops, which XLA does in place.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from sharding.pipeline.split import Layer
from sharding.pipeline.walk import Apart, Loop, Number, Pass
from sharding.zero import wide


class Stack:
    """Layers of one kind; a layer's output is ``(y, cost)``, the cost a scalar that is part of the loss.

    Args:
        layer: one layer in parts.
        slots: layers of the largest stage.
        weights: of all layers that the rank holds, with a leading layer dim, as has ``given``. They may be kept in a
            narrower type than float32, in which a layer sees them and gives their gradients.
        given: see :func:`~sharding.pipeline.split.in_parts`.
        d_cost: what a layer's cost counts in the loss.
        apart: layers of the smallest stage, for every layer to stand in the program by itself: it finds its weights in
            their place, where a loop must copy them out. None: loops.
    """

    def __init__(self, layer: Layer, slots: int, weights: Any, given: Any, d_cost: Array, apart: int | None = None):
        self._layer, self._slots, self._weights, self._given, self._d_cost = layer, slots, weights, given, d_cost
        held = jax.tree.leaves(weights)[0].shape[0]
        self._walk = Loop() if apart is None else Apart(held, slots, apart)
        self._each = [one_of((weights, given), i) for i in range(held) if apart is not None]

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

    def forward(self, memory: Any, x: Array, ahead: Pass) -> tuple[Any, Array]:
        """``x`` after the layers; what they report is added to the record."""
        return self._walk.up(self._ahead, ahead, (memory, x))

    def through(self, x: Array, ahead: Pass) -> Array:
        """:meth:`forward` for its output alone."""
        return self._walk.up(lambda of, i, x: self._layer.forward(*self._of(of.first + i), x)[0][0], ahead, x)

    def backward(self, memory: Any, dy: Array, back: Pass) -> tuple[Any, Array]:
        """The input's gradient, the weights' added."""
        return self._walk.down(self._back, back, (memory, dy))

    def backward_input(self, memory: Any, dy: Array, back: Pass) -> tuple[Any, Array]:
        """:meth:`backward` that puts off what it can of the weights' gradients."""

        def step(of: Pass, i: Number, carry: Any) -> Any:
            memory, dy = carry
            saved = take(memory["kept"], of.slot, i)
            dx, now, rest = self._layer.backward_input(*self._of(of.first + i), saved, (dy, self._d_cost))
            grads = add(memory["grads"], now, of.first + i)
            return memory | {"grads": grads, "late": put(memory["late"], rest, of.late, i)}, dx

        return self._walk.down(step, back, (memory, dy))

    def weight_gradient(self, memory: Any, back: Pass) -> Any:
        """What was put off."""

        def step(of: Pass, i: Number, memory: Any) -> Any:
            found = self._layer.weight_gradient(*self._of(of.first + i), take(memory["late"], of.late, i))
            return memory | {"grads": add(memory["grads"], found, of.first + i)}

        return self._walk.up(step, back, memory)

    def both(
        self, memory: Any, x: Array, dy: Array, ahead: Pass, back: Pass, paired: Bool[Array, ""]
    ) -> tuple[Any, Array, Array]:
        """:meth:`forward` and :meth:`backward`; where they are ``paired``, as many layers as can be go side by side:
        one of each at a time, without dependence on each other."""

        def up(of: Pass, i: Number, carry: Any) -> Any:
            return *self._ahead(of, i, carry[:2]), carry[2]

        def down(of: Pass, i: Number, carry: Any) -> Any:
            memory, dy = self._back(of, i, (carry[0], carry[2]))
            return memory, carry[1], dy

        def pair(ahead: Pass, i: Number, back: Pass, j: Number, carry: Any) -> Any:
            memory, x, dy = carry
            # Read before anything is written, lest XLA copy the rings.
            saved, kept = lax.optimization_barrier((take(memory["kept"], back.slot, j), memory["kept"]))
            memory, x = self._ahead(ahead, i, (memory | {"kept": kept}, x))
            memory, dy = self._back(back, j, (memory, dy), saved)
            return memory, x, dy

        return self._walk.both(up, down, pair, ahead, back, paired, (memory, x, dy))

    def _of(self, layer: Number) -> tuple[Any, Any]:
        weights, given = self._each[layer] if isinstance(layer, int) else take((self._weights, self._given), layer)
        return wide(weights), given

    def _ahead(self, ahead: Pass, i: Number, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        memory, x = carry
        (x, cost), aux, new = self._layer.forward(*self._of(ahead.first + i), x)
        record = add(memory["record"], (cost, aux), ahead.first + i)
        return memory | {"record": record, "kept": put(memory["kept"], new, ahead.slot, i)}, x

    def _back(self, back: Pass, i: Number, carry: tuple[Any, Array], saved: Any = None) -> tuple[Any, Array]:
        memory, dy = carry
        saved = take(memory["kept"], back.slot, i) if saved is None else saved
        dx, dw = self._layer.backward(*self._of(back.first + i), saved, (dy, self._d_cost))
        return memory | {"grads": add(memory["grads"], dw, back.first + i)}, dx


def ring(lead: tuple[int, ...], shape: Any) -> Array:
    """Empty slots."""
    return jnp.zeros((*lead, *shape.shape), shape.dtype)


def take(tree: Any, *index: Number) -> Any:
    """``leaf[index]`` of every array; -1 is the last."""

    def one(leaf: Array) -> Array:
        rest = leaf.shape[len(index) :]
        return lax.dynamic_slice(leaf, (*index, *[0] * len(rest)), (*[1] * len(index), *rest)).reshape(rest)

    return jax.tree.map(one, tree)


def one_of(tree: Any, index: int) -> Any:
    """:func:`take` of a place that is known."""
    return jax.tree.map(lambda leaf: lax.index_in_dim(leaf, index, keepdims=False), tree)


def put(tree: Any, values: Any, *index: Number) -> Any:
    """Every array with ``leaf[index]`` replaced."""

    def one(leaf: Array, value: Any) -> Array:
        rest = leaf.shape[len(index) :]
        update = jnp.reshape(value, (*[1] * len(index), *rest))
        return lax.dynamic_update_slice(leaf, update, (*index, *[0] * len(rest)))

    return jax.tree.map(one, tree, values)


def add(tree: Any, values: Any, index: Number) -> Any:
    """Every array with a value added at ``index``; a value that is None adds nothing.

    The slice keeps its leading 1 until it is back: XLA for GPUs reads, adds and writes it at once only then.
    """

    def one(value: Any, leaf: Array) -> Array:
        if value is None:
            return leaf
        start, rest = (index, *[0] * (leaf.ndim - 1)), leaf.shape[1:]
        found = lax.dynamic_slice(leaf, start, (1, *rest)) + jnp.asarray(value, leaf.dtype)[None]
        return lax.dynamic_update_slice(leaf, found, start)

    return jax.tree.map(one, values, tree, is_leaf=lambda value: value is None)
