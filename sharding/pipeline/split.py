"""A layer's forward pass, its backward pass and its weight gradients as programs that may run far apart.

What passes from one to the next is activations only: whatever comes from weights alone (a cast, a transposed copy) is
computed again from the weights, which are there all the time. The backward pass is cut in two by looking at its
equations: those that the input's gradient needs run at once, the others when the weight gradients are asked for.
Nothing is computed twice but reshapes and what comes from weights alone.
"""

import collections
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

_CALLS = {"jit": "jaxpr", "remat2": "jaxpr", "closed_call": "call_jaxpr"}
"""Primitives that are nothing but others, and the parameter that holds these."""

_ADDS = ("add", "add_any")

_PRODUCTS = ("dot_general", "ragged_dot_general", "pallas_call", "while", "scan")

_STAY = ("dot_general", "ragged_dot_general", "while", "scan")
"""What does not run earlier for the sake of memory; of Pallas's kernels, products read two activations."""

_FREE = ("reshape", "transpose", "squeeze", "broadcast_in_dim")
"""What is done again rather than kept beside its input."""

Arrays = list[Any]
"""Arrays in an order that only this file knows."""


@dataclass(frozen=True)
class Layer:
    """A function ``(weights, given, x) -> (out, aux)`` in parts; ``out`` is differentiated by ``weights`` and ``x``."""

    forward: Callable[[Any, Any, Any], tuple[Any, Any, Arrays]]
    """``(weights, given, x) -> (out, aux, kept)``"""
    backward: Callable[[Any, Any, Arrays, Any], tuple[Any, Any]]
    """``(weights, given, kept, d_out) -> (dx, d_weights)``"""
    backward_input: Callable[[Any, Any, Arrays, Any], tuple[Any, Any, Arrays]]
    """``(weights, given, kept, d_out) -> (dx, d_weights, deferred)``: of ``d_weights`` what cannot be put off, such
    as what a loop adds up that makes the input's gradient too, and vectors, whose gradients are smaller than what they
    are made of; None where that is nothing."""
    weight_gradient: Callable[[Any, Any, Arrays], Any]
    """``(weights, given, deferred) -> d_weights``: the rest; None where that is nothing."""
    kept: list[jax.ShapeDtypeStruct]
    """What goes from forward to backward."""
    deferred: list[jax.ShapeDtypeStruct]
    """What goes from the input's gradient to the weights'."""


def in_parts(function: Callable[[Any, Any, Any], tuple[Any, Any]], weights: Any, given: Any, x: Any) -> Layer:
    """``function`` in parts, for arguments of these shapes; called where it would be, inside ``shard_map`` if it has
    collectives.

    Args:
        function: ``(weights, given, x) -> (out, aux)``.
        weights: a tree of arrays or shapes, as are ``given`` and ``x``.
        given: what it is not differentiated by and is there in all parts.
    """

    def run(weights: Any, given: Any, x: Any) -> tuple[Any, Any, Any]:
        out, back, aux = jax.vjp(lambda weights, x: function(weights, given, x), weights, x, has_aux=True)
        return out, aux, back

    forward, (out, aux, back) = jax.make_jaxpr(run, return_shape=True)(weights, given, x)
    fixed_inputs = forward.invars[: len(jax.tree.leaves((weights, given)))]
    results = len(jax.tree.leaves((out, aux)))
    residuals = forward.outvars[results:]
    moving = _reached(forward.eqns, forward.invars[len(fixed_inputs) :])
    kept = _unique(var for var in _variables(residuals) if var in moving)
    fixed = _unique(var for var in _variables(residuals) if var not in moving)
    run_forward = _part(forward, forward.invars, [*forward.outvars[:results], *kept])
    run_fixed = _part(forward, fixed_inputs, fixed)

    def go_back(kept_values: Arrays, fixed_values: Arrays, d_out: Any) -> tuple[Any, Any]:
        values = dict(zip([*kept, *fixed], [*kept_values, *fixed_values], strict=True))
        leaves = [var.val if isinstance(var, Literal) else values[var] for var in residuals]
        return jax.tree.unflatten(jax.tree.structure(back), leaves)(d_out)[::-1]

    shapes = (_shapes(kept), _shapes(fixed), out)
    flat = jax.make_jaxpr(_without_calls(jax.make_jaxpr(go_back)(*shapes)))(*jax.tree.leaves(shapes))
    cut = _Cut(flat, len(kept), len(fixed), len(jax.tree.leaves(x)))

    def run_parts(weights: Any, given: Any, x: Any) -> tuple[Any, Any, Arrays]:
        values = run_forward(*jax.tree.leaves((weights, given, x)))
        return *jax.tree.unflatten(jax.tree.structure((out, aux)), values[:results]), values[results:]

    def again(weights: Any, given: Any) -> Arrays:
        return run_fixed(*jax.tree.leaves((weights, given)))

    def backward_input(weights: Any, given: Any, kept_values: Arrays, d_out: Any) -> tuple[Any, Any, Arrays]:
        dx, now, deferred = cut.first([*kept_values, *again(weights, given), *jax.tree.leaves(d_out)])
        return jax.tree.unflatten(jax.tree.structure(x), dx), _like(weights, now), deferred

    return Layer(
        forward=run_parts,
        backward=lambda weights, given, kept, d_out: go_back(kept, again(weights, given), d_out),
        backward_input=backward_input,
        weight_gradient=lambda weights, given, late: _like(weights, cut.second([*late, *again(weights, given)])),
        kept=_shapes(kept),
        deferred=_shapes(cut.deferred),
    )


class _Cut:
    """A backward pass ``(kept, fixed, d_out) -> (dx, d_weights)``, all flat, in two."""

    def __init__(self, jaxpr: Jaxpr, n_kept: int, n_fixed: int, n_x: int):
        fixed = jaxpr.invars[n_kept : n_kept + n_fixed]
        moving = _reached(jaxpr.eqns, [var for var in jaxpr.invars if var not in set(fixed)])
        self._maker = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self._dx = jaxpr.outvars[:n_x]
        vectors = [var for var in _variables(jaxpr.outvars[n_x:]) if len(_shapes([var])[0].shape) < 2]
        needed = {id(eqn) for eqn in _needed(jaxpr.eqns, [*self._dx, *vectors])}
        rounded = _rounded([eqn for eqn in jaxpr.eqns if id(eqn) not in needed])
        needed = {id(eqn) for eqn in _needed(jaxpr.eqns, [*self._dx, *vectors, *rounded])}
        smaller = _smaller([eqn for eqn in jaxpr.eqns if id(eqn) not in needed], moving, jaxpr.outvars)
        early = {id(eqn) for eqn in _needed(jaxpr.eqns, [*self._dx, *vectors, *rounded, *smaller])}
        self._is_early = lambda var: var not in self._maker or id(self._maker[var]) in early
        terms = [self._terms(out) for out in jaxpr.outvars[n_x:]]
        self._now = [[var for var in of if self._is_early(var)] for of in terms]
        self._later = [[var for var in of if not self._is_early(var)] for of in terms]
        wanted, late = {var for of in self._later for var in of}, []
        put_off: set[Var] = set()
        for eqn in reversed(jaxpr.eqns):
            mine = wanted & set(eqn.outvars)
            if mine and id(eqn) in early and eqn.primitive.name not in _FREE and mine & moving:
                put_off |= mine
            elif mine:
                late.append(eqn)
                wanted |= set(_variables(eqn.invars))
        self.deferred = [var for var in [*jaxpr.invars, *self._maker] if var in put_off] + [
            var for var in jaxpr.invars if var in wanted and var in moving
        ]
        self._now_vars = _unique(var for of in self._now for var in of)
        self._late_vars = _unique(var for of in self._later for var in of)
        self._first = _part(jaxpr, jaxpr.invars, [*self._dx, *self._now_vars, *self.deferred])
        self._second = _part(jaxpr, [*self.deferred, *fixed], self._late_vars, late[::-1])

    def first(self, values: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        """``dx``, what of the weights' gradients cannot be put off, and what is needed for the rest."""
        found = self._first(*values)
        dx, now, deferred = _cut_list(found, len(self._dx), len(self._now_vars), len(self.deferred))
        return dx, _totals(self._now, dict(zip(self._now_vars, now, strict=True))), deferred

    def second(self, values: Arrays) -> Arrays:
        """The rest."""
        return _totals(self._later, dict(zip(self._late_vars, self._second(*values), strict=True)))

    def _terms(self, out: Any) -> list[Var]:
        """What a gradient is the sum of."""
        if isinstance(out, Literal):
            return []
        eqn = self._maker.get(out)
        if eqn is None or self._is_early(out) or eqn.primitive.name not in _ADDS:
            return [out]
        return [term for part in eqn.invars for term in self._terms(part)]


def _rounded(eqns: Sequence[JaxprEqn]) -> list[Var]:
    """What is made narrower on its way into products: better kept so than as it was."""
    products = [var for eqn in eqns if eqn.primitive.name in _PRODUCTS for var in eqn.outvars]
    behind = _reached(eqns, products)
    casts = [eqn for eqn in eqns if eqn.primitive.name == "convert_element_type" and eqn.outvars[0] not in behind]
    return [eqn.outvars[0] for eqn in casts if _bytes(eqn.outvars) < _bytes(_variables(eqn.invars))]


def _smaller(eqns: Sequence[JaxprEqn], moving: set[Var], outputs: Sequence[Any]) -> list[Var]:
    """What comes from one activation alone and takes less room, such as its 8 bits: better kept in its place."""
    made, users = {var for eqn in eqns for var in eqn.outvars}, collections.defaultdict(list)
    for eqn in eqns:
        for var in set(_variables(eqn.invars)):
            users[var].append(id(eqn))
    wanted = {var for var in _variables(outputs) if var in made}
    found = []
    for source in [var for var in users if var in moving and var not in made]:
        chain, reached, done = [], {source}, set()
        best, least = [], _bytes([source])
        for eqn in eqns:
            inputs = {var for var in _variables(eqn.invars) if var in moving}
            if not inputs or not inputs <= reached or eqn.primitive.name in _STAY:
                continue
            chain.append(eqn)
            reached |= set(eqn.outvars)
            done.add(id(eqn))
            if done.issuperset(users[source]):
                kept = [v for one in chain for v in one.outvars if v in wanted or not done.issuperset(users[v])]
                best, least = (kept, _bytes(kept)) if _bytes(kept) < least else (best, least)
        found += best
    return found


def _bytes(variables: Sequence[Var]) -> int:
    return sum(of.size * of.dtype.itemsize for of in _shapes(variables))


def _totals(terms: list[list[Var]], values: dict[Var, Any]) -> Arrays:
    return [sum((values[var] for var in of[1:]), start=values[of[0]]) if of else None for of in terms]


def _cut_list(values: Arrays, *lengths: int) -> list[Arrays]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _part(jaxpr: Jaxpr, inputs: Sequence[Var], outputs: Sequence[Any], eqns: Any = None) -> Callable[..., Arrays]:
    """The part of a program that makes ``outputs`` from ``inputs``."""
    eqns = _needed(jaxpr.eqns, outputs) if eqns is None else eqns
    part = jaxpr.replace(invars=list(inputs), outvars=list(outputs), eqns=eqns)
    return lambda *values: eval_jaxpr(part, jaxpr.consts, *values)


def _without_calls(jaxpr: Jaxpr) -> Callable[..., Arrays]:
    """The same program, with what its calls hold in their places."""

    def run(jaxpr: Jaxpr, *values: Any) -> Arrays:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*jaxpr.consts, *values], strict=True))
        for eqn in jaxpr.eqns:
            arguments = [var.val if isinstance(var, Literal) else known[var] for var in eqn.invars]
            inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
            with eqn.ctx.manager, _scope(eqn):
                found = run(inner, *arguments) if inner is not None else _summed_after(eqn, arguments)
            known |= dict(zip(eqn.outvars, found, strict=True))
        return [var.val if isinstance(var, Literal) else known[var] for var in jaxpr.outvars]

    return lambda *values: run(jaxpr, *values)


def _scope(eqn: JaxprEqn) -> contextlib.AbstractContextManager[object]:
    """The named scopes that an equation lies in, by which a profile tells the parts of a step."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _summed_after(eqn: JaxprEqn, arguments: Arrays) -> Arrays:
    """An equation's results. A loop adds up from 0 what it does no more than add to, and what it would have started
    from is added after it: so a weight gradient that goes into a loop can wait, although what the loop adds cannot."""
    sums = _sums(eqn)
    starts = [jnp.zeros_like(value) if i in sums else value for i, value in enumerate(arguments)]
    found = eqn.primitive.bind(*starts, **eqn.primitive.get_bind_params(eqn.params))
    found = list(found) if eqn.primitive.multiple_results else [found]
    for place, out in sums.items():
        found[out] = arguments[place] + found[out]
    return found


def _sums(eqn: JaxprEqn) -> dict[int, int]:
    """Of a loop, the matrices that it only adds to: argument and result."""
    known = eqn.params
    if eqn.primitive.name == "while":
        body, fixed, before, carried = known["body_jaxpr"], known["body_nconsts"], known["cond_nconsts"], eqn.outvars
    elif eqn.primitive.name == "scan":
        fixed, carry, _ = (len(part) for part in known["ft_in"].unpack())
        body, fixed, before, carried = known["jaxpr"], fixed, 0, eqn.outvars[:carry]
    else:
        return {}
    uses = collections.Counter(_variables([*body.outvars, *(var for one in body.eqns for var in one.invars)]))
    maker = {var: one for one in body.eqns for var in one.outvars}
    found = {}
    for i, var in enumerate(body.invars[fixed : fixed + len(carried)]):
        last = maker.get(body.outvars[i]) if isinstance(body.outvars[i], Var) else None
        only = last is not None and last.primitive.name in _ADDS and var in _variables(last.invars) and uses[var] == 1
        if only and len(_shapes([var])[0].shape) > 1:
            found[before + fixed + i] = i
    return found


def _needed(eqns: Sequence[Any], outputs: Iterable[Any]) -> list[Any]:
    """The equations that ``outputs`` come from, in order."""
    wanted, found = set(_variables(outputs)), []
    for eqn in reversed(eqns):
        if wanted & set(eqn.outvars):
            found.append(eqn)
            wanted |= set(_variables(eqn.invars))
    return found[::-1]


def _reached(eqns: Sequence[Any], sources: Iterable[Var]) -> set[Var]:
    """The variables that depend on ``sources``."""
    reached = set(sources)
    for eqn in eqns:
        if reached & set(_variables(eqn.invars)):
            reached |= set(eqn.outvars)
    return reached


def _variables(values: Iterable[Any]) -> list[Var]:
    return [var for var in values if not isinstance(var, Literal)]


def _unique(variables: Iterable[Var]) -> list[Var]:
    return list(dict.fromkeys(variables))


def _shapes(variables: Iterable[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in variables]


def _like(tree: Any, leaves: Arrays) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
