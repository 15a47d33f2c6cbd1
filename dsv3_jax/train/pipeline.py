"""Gradients of a step whose layers lie on the ranks of a pipeline (design section 5).

Mixture-of-experts layers are the pipeline's. The first stage has the embedding and the dense layers before them, the
last the head and MTP after them, with weights that every rank holds. All ranks run one program: what belongs to an end
of the pipeline is a loop of no turn on other stages, so that it takes no time and arrays stay in their places.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.model import DeepSeekV3, Tree, merge_model, split_model
from dsv3_jax.nn import fp8
from dsv3_jax.nn.block import Block, rematerialize
from dsv3_jax.nn.router import RouterBias
from dsv3_jax.train.loss import Losses, activation_dtype, balance_of, end_losses
from sharding.pipeline.executor import Stage, execute, plan_of
from sharding.pipeline.partition import Partition
from sharding.pipeline.schedule import make_schedule
from sharding.pipeline.split import in_parts
from sharding.pipeline.stack import Stack, put, take, when, zeros
from sharding.pipeline.table import Col, table

_Memory = dict[str, Any]


class Weights(NamedTuple):
    """What a rank computes with in one step: arrays, whole but for the experts, its own stages' layers stacked."""

    params: Tree
    codes: Mapping[str, Any]
    """Of FP8 products, by path."""
    router_bias: Tree
    """Of all layers of the model."""


class Pipeline:
    """The part of a run's step that depends on its schedule.

    Args:
        config: the run.
        model: its abstract model, experts placed; used up.
        partition: its layers on the ranks.
        micro_batches: of the largest step.

    Raises:
        ConfigError: the schedule cannot be made for so many; one line.
    """

    def __init__(self, config: Config, model: DeepSeekV3, partition: Partition, micro_batches: int):
        self.config, self.partition, self._most = config, partition, micro_batches
        largest = self._table(micro_batches)
        self.plan, self.slots = plan_of(largest), largest.slots
        self.blocks = {
            name: nnx.split(getattr(model, name), nnx.Param, RouterBias)[0]
            for name in ("dense", "moe")
            if hasattr(model, name)
        }
        del model.moe
        self.ends = split_model(model).graph

    def rows(self, micro_batches: int) -> tuple[Any, Any]:
        """The table of a step of so many micro-batches, int32 of one shape for all, and how many ticks it has."""
        found = self._table(micro_batches)
        return found.padded(self._table(self._most).ticks), jnp.int32(found.ticks)

    @functools.cache  # noqa: B019  A run has few.
    def _table(self, micro_batches: int) -> Any:
        mesh = self.config.mesh
        try:
            return table(make_schedule(mesh.schedule, mesh.pipe, micro_batches))
        except ValueError as error:
            raise ConfigError(f"mesh.schedule = {mesh.schedule!r}: {error}") from error

    def with_mirror(self, params: Tree) -> Tree:
        """Inside ``shard_map``: the weights that a rank computes with from those that it stores.

        DualPipe's second chunk is the mirror rank's first. Both copies are rounded alike.
        """
        return params | {"moe": jax.tree.map(self._joined, params["moe"])} if self._mirrors else params

    def without_mirror(self, grads: Tree) -> Tree:
        """Inside ``shard_map``: gradients of what a rank stores from those of what it computed with."""
        return grads | {"moe": jax.tree.map(self._folded, grads["moe"])} if self._mirrors else grads

    @property
    def _mirrors(self) -> bool:
        return self.partition.held.shape[1] > self.partition.stored

    def _exchange(self, x: Array) -> Array:
        ranks = self.plan.ranks
        return lax.ppermute(x, "pipe", [(rank, ranks - 1 - rank) for rank in range(ranks)])

    def _joined(self, own: Array) -> Array:
        return jnp.concatenate([own, self._exchange(own)])

    def _folded(self, both: Array) -> Array:
        own, other = jnp.split(both, 2)
        return own + self._exchange(other)

    def gradients(
        self,
        weights: Weights,
        tokens: Int[Array, "A B T1"],
        rows: Int[Array, "ticks ranks C"],
        ticks: Int[Array, ""],
        scalars: dict[str, Array],
    ) -> tuple[Tree, Losses]:
        """Inside ``shard_map``: this device's share of the step's gradients, float32, and of its losses.

        Args:
            weights: of :meth:`with_mirror`; the gradients are of these.
            tokens: this lane's micro-batches, on every rank of the pipeline.
            rows: of :meth:`rows`, as is ``ticks``.
            scalars: keyword arguments of :func:`~dsv3_jax.train.loss.end_losses`.
        """
        model = self.config.model
        message = jax.ShapeDtypeStruct(
            (tokens.shape[1], tokens.shape[2] - 1, model.hidden_size), activation_dtype(self.config.train.precision)
        )
        stage = _Stage(self, weights, tokens, scalars, message)
        memory = execute(stage, self.plan, rows, ticks, stage.memory(), message)
        return memory["grads"], stage.losses(memory)


class _Stage(Stage):
    """One step's computation, while it is traced; public methods are described where they are inherited from."""

    def __init__(self, pipeline: Pipeline, weights: Weights, tokens: Array, scalars: dict[str, Array], message: Any):
        self._pipeline, self._weights, self._tokens, self._scalars = pipeline, weights, tokens, scalars
        self._message = message
        model, partition = pipeline.config.model, pipeline.partition
        self._last = len(partition.counts) - 1
        self._counts = jnp.asarray(partition.counts, jnp.int32)
        self._dense = model.n_dense_layers
        self._layers = jnp.asarray(partition.held.reshape(pipeline.plan.ranks, -1))[lax.axis_index("pipe")]
        self._d_cost = tokens.shape[1] / scalars["sequence_total"]
        self._given = {name: self._given_of(name) for name in pipeline.blocks}
        self._stacks = {
            name: self._stack(name, partition.slots if name == "moe" else self._dense) for name in pipeline.blocks
        }

    def _given_of(self, name: str) -> Tree:
        """Router biases and codes of a stack, by layer."""
        bias = self._weights.router_bias.get(name, {})
        codes = {path: code for path, code in self._weights.codes.items() if path.startswith(f"{name}/")}
        return {"bias": jax.tree.map(lambda leaf: leaf[jnp.maximum(self._layers, 0)], bias), "codes": codes}

    def _stack(self, name: str, slots: int) -> Stack:
        train, graph = self._pipeline.config.train, self._pipeline.blocks[name]
        positions = jnp.broadcast_to(jnp.arange(self._message.shape[1]), self._message.shape[:2])
        balance = balance_of(self._pipeline.config)

        def layer(params: Tree, given: Tree, x: Array) -> tuple[tuple[Array, Array], Any]:
            params = fp8.attach({name: params}, given["codes"])[name]
            block: Block = nnx.merge(graph, nnx.State(params), nnx.State(given["bias"]))
            x, aux, _ = block(x, positions, balance=balance)
            if aux is None:
                return (x, jnp.zeros((), jnp.float32)), ()
            return (x, aux.balance_loss), aux.counts

        one = functools.partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype))
        function = rematerialize(layer, train.remat, scanned=True)
        parts = in_parts(function, one(self._weights.params[name]), one(self._given[name]), self._message)
        return Stack(parts, slots)

    def memory(self) -> _Memory:
        """What a step starts with: empty rings, sums of nothing."""
        slots, params = self._pipeline.slots, self._weights.params
        rings = {"moe": (slots.residual, slots.deferred), "dense": (slots.first, slots.deferred_first)}
        grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return {
            "kept": {name: stack.kept(rings[name][0]) for name, stack in self._stacks.items()},
            "late": {name: stack.deferred(rings[name][1]) for name, stack in self._stacks.items()},
            "raw": zeros((slots.last + 1,), self._message),
            "grads": grads,
            "record": {name: self._empty_record(name) for name in self._stacks},
            "end": jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                jax.eval_shape(self._end, self._late_params(), self._message, self._tokens[0])[1],
            ),
        }

    def _empty_record(self, name: str) -> tuple[Array, Any]:
        layers = jax.tree.leaves(self._weights.params[name])[0].shape[0]
        counts = jnp.zeros((layers, self._pipeline.config.model.n_routed_experts), jnp.int32) if name == "moe" else ()
        return jnp.zeros((layers,), jnp.float32), counts

    def forward(self, memory: _Memory, x: Array, row: Array) -> tuple[_Memory, Array]:
        """See :class:`sharding.pipeline.executor.Stage`."""
        is_first = row[Col.F_STAGE] == 0
        tokens = take(self._tokens, row[Col.F_MICRO])
        table = self._weights.params["embedding"]["table"]
        x = jnp.where(is_first, table[jnp.maximum(tokens[:, :-1], 0)].astype(x.dtype), x)
        kept, record = dict(memory["kept"]), dict(memory["record"])
        for name in self._stacks:
            first, count = self._range(name, row[Col.F_CHUNK], row[Col.F_STAGE])
            slot = row[Col.F_SAVE if name == "moe" else Col.F_SAVE_FIRST]
            x, kept[name], record[name] = self._stacks[name].forward(
                self._weights.params[name], self._given[name], x, kept[name], record[name], first, count, slot
            )
        raw = put(memory["raw"], x, row[Col.F_SAVE_LAST])
        return memory | {"kept": kept, "record": record, "raw": raw}, x

    def _range(self, name: str, chunk: Array, stage: Array) -> tuple[Any, Array]:
        """First layer and number of layers of a pass through a stack."""
        if name == "dense":
            return 0, jnp.where(stage == 0, self._dense, 0)
        return chunk * self._pipeline.partition.slots, self._counts[stage]

    def backward(self, memory: _Memory, dy: Array, row: Array) -> tuple[_Memory, Array]:
        """See :class:`sharding.pipeline.executor.Stage`."""
        return self._backward(memory, dy, row, defer=False)

    def backward_input(self, memory: _Memory, dy: Array, row: Array) -> tuple[_Memory, Array]:
        """See :class:`sharding.pipeline.executor.Stage`. The ends' own gradients are not put off."""
        return self._backward(memory, dy, row, defer=True)

    def _backward(self, memory: _Memory, dy: Array, row: Array, *, defer: bool) -> tuple[_Memory, Array]:
        memory, dy = self._from_the_loss(memory, dy, row)
        grads, late = dict(memory["grads"]), dict(memory["late"])
        for name in reversed(self._stacks):
            suffix = "" if name == "moe" else "_FIRST"
            stack, weights, given = self._stacks[name], self._weights.params[name], self._given[name]
            first, count = self._range(name, row[Col.B_CHUNK], row[Col.B_STAGE])
            saved = memory["kept"][name], first, count, row[Col["B_SAVED" + suffix]]
            arguments = (weights, given, dy, self._d_cost, grads[name], *saved)
            if defer:
                dy, grads[name], late[name] = stack.backward_input(
                    *arguments, late[name], row[Col["DEFERRED" + suffix]]
                )
            else:
                dy, grads[name] = stack.backward(*arguments)
        tokens = jnp.maximum(take(self._tokens, row[Col.B_MICRO])[:, :-1], 0)
        grads["embedding"] = when(
            row[Col.B_STAGE] == 0,
            lambda grad: {"table": grad["table"].at[tokens].add(dy.astype(jnp.float32))},
            grads["embedding"],
        )
        return memory | {"grads": grads, "late": late}, dy

    def weight_gradient(self, memory: _Memory, row: Array) -> _Memory:
        """See :class:`sharding.pipeline.executor.Stage`."""
        grads = dict(memory["grads"])
        for name, stack in self._stacks.items():
            first, count = self._range(name, row[Col.B_CHUNK], row[Col.B_STAGE])
            slot = row[Col.DEFERRED if name == "moe" else Col.DEFERRED_FIRST]
            weights, given = self._weights.params[name], self._given[name]
            grads[name] = stack.weight_gradient(weights, given, memory["late"][name], grads[name], first, count, slot)
        return memory | {"grads": grads}

    def both(self, memory: _Memory, x: Array, dy: Array, row: Array) -> tuple[_Memory, Array, Array]:
        """See :class:`sharding.pipeline.executor.Stage`."""
        memory, dx = self.backward(memory, dy, row)
        memory, y = self.forward(memory, x, row)
        return memory, y, dx

    def _late_params(self) -> Tree:
        return {name: part for name, part in self._weights.params.items() if name not in ("dense", "moe")}

    def _end(self, late_params: Tree, raw: Array, tokens: Array) -> tuple[Array, Losses]:
        """What comes after the last layer."""
        params = {name: part for name, part in self._weights.params.items() if name == "dense"} | late_params
        bias = {name: part for name, part in self._weights.router_bias.items() if name != "moe"}
        model = merge_model(self._pipeline.ends, fp8.attach(params, self._weights.codes), bias)
        losses = end_losses(model, raw, tokens, self._pipeline.config, None, **self._scalars)
        return losses.total, losses

    def _from_the_loss(self, memory: _Memory, dy: Array, row: Array) -> tuple[_Memory, Array]:
        """On the last stage, the trunk output's gradient, and its losses and weights' gradients added up.

        They are all made here, of the trunk's output, so that nothing else is kept for them.
        """
        params = self._late_params()

        def make(carry: Any) -> Any:
            grads, end, _ = carry
            raw, tokens = take(memory["raw"], row[Col.B_SAVED_LAST]), take(self._tokens, row[Col.B_MICRO])
            (_, losses), (found, d_raw) = jax.value_and_grad(self._end, (0, 1), has_aux=True)(params, raw, tokens)
            return jax.tree.map(jnp.add, grads, found), jax.tree.map(jnp.add, end, losses), d_raw

        grads = {name: memory["grads"][name] for name in params}
        grads, end, dy = when(row[Col.B_STAGE] == self._last, make, (grads, memory["end"], dy))
        return memory | {"grads": memory["grads"] | grads, "end": end}, dy

    def losses(self, memory: _Memory) -> Losses:
        """This rank's part of the step's losses, and of the counts of all routers of the model."""
        end: Losses = memory["end"]
        cost, counts = memory["record"]["moe"]
        balance = jnp.sum(cost) * self._d_cost
        layers = self._pipeline.config.model.n_moe_layers
        places = jnp.where(self._layers < 0, layers, self._layers)
        all_counts = jnp.zeros((layers, counts.shape[1]), counts.dtype).at[places].add(counts, mode="drop")
        if end.counts is not None:
            all_counts = jnp.concatenate([all_counts, end.counts])
        return Losses(end.total + balance, end.main, end.mtp, end.balance + balance, all_counts)
