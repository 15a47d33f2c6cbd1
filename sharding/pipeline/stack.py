"""A stack of equal layers inside a stage: run layer by layer, what the backward pass needs kept in rings.

Loops go over as many layers as the stage has, a traced number, so that stages with fewer layers do less. All arrays
that a loop changes are carried through it, which XLA does in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from sharding.pipeline.split import Layer

Index = Int[Array, ""]


class Stack:
    """Layers of one kind.

    Weights, gradients and records have a leading layer dim of all that the rank holds; a stage's layers are ``count``
    of them from ``first`` on. A layer's output is ``(y, cost)``, the cost a scalar that is part of the loss.
    """

    def __init__(self, layer: Layer, slots: int):
        self._layer, self._slots = layer, slots

    def kept(self, ring: int) -> list[Array]:
        """An empty ring of so many slots, and one that takes what nobody reads, for :meth:`forward`."""
        return [zeros((ring + 1, self._slots), shape) for shape in self._layer.kept]

    def deferred(self, ring: int) -> list[Array]:
        """The same for :meth:`backward`."""
        return [zeros((ring + 1, self._slots), shape) for shape in self._layer.deferred]

    def forward(
        self, weights: Any, given: Any, x: Any, kept: list[Array], record: Any, first: Index, count: Index, slot: Index
    ) -> tuple[Any, list[Array], Any]:
        """``x`` after the layers; ``kept`` with what their backward passes need in ``slot``; ``record`` with what they
        report (cost and aux) added."""

        def step(i: Index, carry: Any) -> Any:
            x, kept, record = carry
            (x, cost), aux, new = self._layer.forward(take(weights, first + i), take(given, first + i), x)
            return x, put(kept, new, slot, i), add(record, (cost, aux), first + i)

        return lax.fori_loop(0, count, step, (x, kept, record))

    def backward(
        self,
        weights: Any,
        given: Any,
        dy: Any,
        d_cost: Array,
        grads: Any,
        kept: list[Array],
        first: Index,
        count: Index,
        slot: Index,
    ) -> tuple[Any, Any]:
        """The input's gradient, and ``grads`` with the layers' added."""

        def step(i: Index, carry: Any) -> Any:
            dy, grads = carry
            at = count - 1 - i
            w, g, saved = take(weights, first + at), take(given, first + at), take(kept, slot, at)
            dx, dw = self._layer.backward(w, g, saved, (dy, d_cost))
            return dx, add(grads, dw, first + at)

        return lax.fori_loop(0, count, step, (dy, grads))

    def backward_input(
        self,
        weights: Any,
        given: Any,
        dy: Any,
        d_cost: Array,
        grads: Any,
        kept: list[Array],
        first: Index,
        count: Index,
        slot: Index,
        deferred: list[Array],
        late: Index,
    ) -> tuple[Any, Any, list[Array]]:
        """:meth:`backward`, but of the weight gradients what can be put off is: it lies in slot ``late`` then."""

        def step(i: Index, carry: Any) -> Any:
            dy, grads, deferred = carry
            at = count - 1 - i
            w, g, saved = take(weights, first + at), take(given, first + at), take(kept, slot, at)
            dx, dw, rest = self._layer.backward_input(w, g, saved, (dy, d_cost))
            return dx, add(grads, dw, first + at), put(deferred, rest, late, at)

        return lax.fori_loop(0, count, step, (dy, grads, deferred))

    def weight_gradient(
        self, weights: Any, given: Any, deferred: list[Array], grads: Any, first: Index, count: Index, late: Index
    ) -> Any:
        """``grads`` with what was put off added."""

        def step(i: Index, grads: Any) -> Any:
            w, g, saved = take(weights, first + i), take(given, first + i), take(deferred, late, i)
            return add(grads, self._layer.weight_gradient(w, g, saved), first + i)

        return lax.fori_loop(0, count, step, grads)


def when(condition: Bool[Array, ""], change: Callable[[Any], Any], carry: Any) -> Any:
    """``change(carry)`` where the condition holds, else ``carry``, in place: a loop of one turn or none."""
    return lax.fori_loop(0, condition.astype(jnp.int32), lambda _, carry: change(carry), carry)


def zeros(lead: tuple[int, ...], shape: Any) -> Array:
    """An empty ring."""
    return jnp.zeros((*lead, *shape.shape), shape.dtype)


def take(tree: Any, *index: Any) -> Any:
    """``leaf[index]`` of every array; -1 is the last."""

    def one(leaf: Array) -> Array:
        rest = leaf.shape[len(index) :]
        start = (*index, *[0] * len(rest))
        return lax.dynamic_slice(leaf, start, (*[1] * len(index), *rest)).reshape(rest)

    return jax.tree.map(one, tree)


def put(tree: Any, values: Any, *index: Any) -> Any:
    """Every array with ``leaf[index]`` replaced."""

    def one(leaf: Array, value: Array) -> Array:
        rest = leaf.shape[len(index) :]
        return lax.dynamic_update_slice(leaf, value.reshape(*[1] * len(index), *rest), (*index, *[0] * len(rest)))

    return jax.tree.map(one, tree, values)


def add(tree: Any, values: Any, index: Any) -> Any:
    """Every array with a value added at ``index``; a value that is None adds nothing."""

    def one(value: Array | None, leaf: Array) -> Array:
        return leaf if value is None else put(leaf, take(leaf, index) + value.astype(leaf.dtype), index)

    return jax.tree.map(one, values, tree, is_leaf=lambda value: value is None)
