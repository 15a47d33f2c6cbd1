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
from dsv3_jax.train.layout import travel_dtype
from dsv3_jax.train.loss import Losses, activation_dtype, balance_of, cross_entropy, has_label
from dsv3_jax.train.pipeline_end import add_end_gradients
from pallas_kernels.quantize import Weight
from sharding.pipeline.actions import BACKWARD, FORWARD, Kind
from sharding.pipeline.executor import execute, plan_of
from sharding.pipeline.partition import Partition
from sharding.pipeline.schedule import make_schedule
from sharding.pipeline.split import in_parts
from sharding.pipeline.stack import Stack, put, ring, take
from sharding.pipeline.table import Col, Table, table
from sharding.pipeline.walk import Pass, when
from sharding.zero import wide

_Memory = dict[str, Any]


class Weights(NamedTuple):
    """What a rank computes with in one step: arrays, whole but for the experts, its own stages' layers stacked."""

    params: Tree
    codes: Mapping[str, Any]
    """Of FP8 products, by path."""
    router_bias: Tree
    """Of all layers of the model."""


@functools.cache
def step_table(config: Config, micro_batches: int) -> Table:
    """The table of a step of so many micro-batches.

    Raises:
        ConfigError: the schedule cannot be made for so many; one line.
    """
    try:
        mesh = config.mesh
        return table(make_schedule(mesh.schedule, mesh.pipe, micro_batches, mesh.waiting), mesh.lag)
    except ValueError as error:
        raise ConfigError(f"mesh.schedule: {error}") from error


class Pipeline:
    """The part of a run's step that depends on its schedule.

    Args:
        config: the run.
        model: its abstract model, experts placed; used up.
        partition: its layers on the ranks.
        tables: what the program must be able to run: of the run's schedule, the largest step's.
    """

    def __init__(self, config: Config, model: DeepSeekV3, partition: Partition, *tables: Table):
        self.config, self.partition, self.plan, self._tables = config, partition, plan_of(*tables), tables
        self.blocks = {
            name: nnx.split(getattr(model, name), nnx.Param, RouterBias)[0]
            for name in ("dense", "moe")
            if hasattr(model, name)
        }
        del model.moe
        self.ends = split_model(model).graph

    def rows(self, table: Table) -> tuple[Any, Any]:
        """A table as :meth:`gradients` takes it, int32 of one shape for all, and how many ticks it has."""
        return table.padded(self.plan.ticks), jnp.int32(table.ticks)

    def with_mirror(self, params: Tree, codes: Mapping[str, Weight]) -> tuple[Tree, Mapping[str, Weight]]:
        """Inside ``shard_map``: the weights that a rank computes with from those that it stores.

        DualPipe's second chunk is the mirror rank's first. Both copies are rounded alike; what has codes travels as
        these, and its own stands for the other's master, which nobody reads.
        """
        if not self._mirrors:
            return params, codes

        def joined(path: Any, own: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return jnp.concatenate([own, own]) if f"moe/{name}" in codes else self._joined(own)

        moe = jax.tree_util.tree_map_with_path(joined, params["moe"])
        mirrored = {path: self._joined_codes(one) if path.startswith("moe/") else one for path, one in codes.items()}
        return params | {"moe": moe}, mirrored

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

    def _joined_codes(self, own: Weight) -> Weight:
        bits = self._exchange(lax.bitcast_convert_type(own.q_KN, jnp.uint8))
        q_KN, scale_KN = lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), self._exchange(own.scale_KN)
        other = Weight(q_KN.mT, scale_KN.mT, q_KN, scale_KN)
        return jax.tree.map(lambda *two: jnp.concatenate(two), own, other)

    def _folded(self, both: Array) -> Array:
        own, other = jnp.split(both, 2)
        return own + self._exchange(other)

    def nats(self, weights: Weights, tokens: Int[Array, "A B T1"]) -> Array:
        """Inside ``shard_map``: this rank's part of the main head's cross entropy, summed over all labels; float32.

        The tables are forward passes alone, of the layers that ranks store, for as many micro-batches as there are.
        """
        stage = _Stage(self, weights, tokens, {"sequence_total": jnp.float32(1)}, self._message(tokens))
        start = jnp.zeros((tokens.shape[0] + 1, *stage.message.shape), stage.message.dtype)
        rows, ticks = self.rows(self._tables[0])
        raw = execute(stage.tick_ahead, self.plan, jnp.asarray(rows), ticks, start, stage.message)
        return stage.nats(raw[:-1])

    def _message(self, tokens: Array) -> jax.ShapeDtypeStruct:
        shape = tokens.shape[1], tokens.shape[2] - 1, self.config.model.hidden_size
        return jax.ShapeDtypeStruct(shape, activation_dtype(self.config.train.precision))

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
            scalars: keyword arguments of :func:`~dsv3_jax.train.pipeline_end.add_end_gradients`.
        """
        stage = _Stage(self, weights, tokens, scalars, self._message(tokens))
        memory = execute(stage.tick, self.plan, rows, ticks, stage.memory(), stage.message)
        return stage.gradients(memory), stage.losses(memory)


class _Stage:
    """What a rank computes in one step, while it is traced."""

    def __init__(self, pipeline: Pipeline, weights: Weights, tokens: Array, scalars: dict[str, Array], message: Any):
        config = pipeline.config

        def narrow(path: Any, leaf: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return leaf.astype(travel_dtype(name, leaf.ndim, config))

        params = jax.tree_util.tree_map_with_path(narrow, weights.params)
        self._pipeline, self._tokens, self._scalars = pipeline, tokens, scalars
        self._weights = weights._replace(params=params)
        self.message = message
        model, partition = config.model, pipeline.partition
        self._n_dense, self._slots, self._last = model.n_dense_layers, partition.slots, len(partition.counts) - 1
        self._counts = jnp.asarray(partition.counts, jnp.int32)
        self._layers = jnp.asarray(partition.held.reshape(pipeline.plan.ranks, -1))[lax.axis_index("pipe")]
        self._d_cost = tokens.shape[1] / scalars["sequence_total"]
        self._moe = self._stack("moe", self._slots, min(partition.counts))
        self._dense = self._stack("dense", self._n_dense, self._n_dense) if self._n_dense else None

    def _stack(self, name: str, slots: int, least: int) -> Stack:
        train, graph = self._pipeline.config.train, self._pipeline.blocks[name]
        positions = jnp.broadcast_to(jnp.arange(self.message.shape[1]), self.message.shape[:2])
        balance = balance_of(self._pipeline.config)

        def layer(params: Tree, given: Tree, x: Array) -> tuple[tuple[Array, Array], Any]:
            params = fp8.attach({name: params}, given["codes"])[name]
            block: Block = nnx.merge(graph, nnx.State(params), nnx.State(given["bias"]))
            x, aux, _ = block(x, positions, balance=balance)
            if aux is None:
                return (x, jnp.zeros((), jnp.float32)), ()
            return (x, aux.balance_loss), aux.counts

        params = self._weights.params[name]
        bias = self._weights.router_bias.get(name, {}) if name == "moe" else {}
        given = {
            "bias": jax.tree.map(lambda leaf: leaf[jnp.maximum(self._layers, 0)], bias),
            "codes": {path: code for path, code in self._weights.codes.items() if path.startswith(f"{name}/")},
        }
        function = rematerialize(layer, train.remat, scanned=True)
        one, given_one = jax.eval_shape(lambda: (wide(take(params, 0)), take(given, 0)))
        parts = in_parts(function, one, given_one, self.message)
        return Stack(parts, slots, params, given, self._d_cost, apart=least if train.unroll else None)

    def memory(self) -> _Memory:
        """What a step starts with: empty rings, sums of nothing."""
        slots, experts = self._pipeline.plan.slots, self._pipeline.config.model.n_routed_experts
        held, grads = self._layers.size, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), self._late)
        _, losses, _ = jax.eval_shape(self._end, grads, self.message, self._tokens[0])
        counts = jnp.zeros((held, experts), jnp.int32)
        memory = {
            "moe": self._moe.memory((jnp.zeros((held,), jnp.float32), counts), slots.residual, slots.deferred),
            "raw": ring((slots.last + 1,), self.message),
            "grads": grads,
            "losses": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), losses),
        }
        if self._dense:
            record = (jnp.zeros((self._n_dense,), jnp.float32), ())
            memory["dense"] = self._dense.memory(record, slots.first, 0)
        return memory

    def tick(self, memory: _Memory, x: Array, dy: Array, row: Array) -> tuple[_Memory, Array, Array]:
        """See :data:`sharding.pipeline.executor.Tick`."""
        kinds = self._pipeline.plan.kinds

        def is_one(*of: Kind) -> Array:
            return jnp.any(jnp.asarray([row[Col.KIND] == kind for kind in of]))

        ahead, at_first = self._passes(row, "F", is_one(*FORWARD))
        back, _ = self._passes(row, "B", is_one(Kind.B, Kind.FB))
        later, _ = self._passes(row, "B", is_one(Kind.BX))
        weight, _ = self._passes(row, "B", is_one(Kind.W))
        _, back_at_first = self._passes(row, "B", is_one(*BACKWARD))  # nobody waits for it: nothing is put off
        x = jnp.where(row[Col.F_STAGE] == 0, self._embedded(take(self._tokens, row[Col.F_MICRO])), x)
        memory, dy = self._from_the_loss(memory, dy, row, is_one(*BACKWARD))
        memory, dense, moe = dict(memory), memory.get("dense"), memory["moe"]
        if self._dense:
            dense, x = self._dense.forward(dense, x, at_first)
        if Kind.FB in kinds:
            moe, y, dy = self._moe.both(moe, x, dy, ahead, back, is_one(Kind.FB))
        else:
            moe, y = self._moe.forward(moe, x, ahead)
            moe, dy = self._moe.backward(moe, dy, back)
        memory["raw"] = put(memory["raw"], y, row[Col.F_SAVE_LAST])
        if Kind.BX in kinds:
            moe, dy = self._moe.backward_input(moe, dy, later)
            moe = self._moe.weight_gradient(moe, weight)
        if self._dense:
            memory["dense"], dy = self._dense.backward(dense, dy, back_at_first)
        memory["grads"] = self._into_the_table(memory["grads"], dy, row, is_one(*BACKWARD))
        return memory | {"moe": moe}, y, dy

    def tick_ahead(self, raw: Array, x: Array, dy: Array, row: Array) -> tuple[Array, Array, Array]:
        """:meth:`tick` of a forward pass alone; ``raw`` are the trunk's outputs by micro-batch."""
        ahead, at_first = self._passes(row, "F", row[Col.KIND] == Kind.F)
        x = jnp.where(row[Col.F_STAGE] == 0, self._embedded(take(self._tokens, row[Col.F_MICRO])), x)
        if self._dense:
            x = self._dense.through(x, at_first)
        y = self._moe.through(x, ahead)
        return put(raw, y, jnp.where(row[Col.F_STAGE] == self._last, row[Col.F_MICRO], -1)), y, dy

    def nats(self, raw: Array) -> Array:
        """Cross entropy of the main head, on the rank of the last stage; 0 elsewhere."""
        labels, weights = jnp.maximum(self._tokens, 0)[..., 1:], has_label(self._tokens).astype(jnp.float32)
        config = self._pipeline.config

        def add(total: Array) -> Array:
            model = self._model(wide(self._late))
            hidden = model.final_norm(raw).reshape(-1, raw.shape[-1])
            rows = labels.reshape(-1), weights.reshape(-1)
            return total + cross_entropy(hidden, model.head_weight(), *rows, config.train.loss_chunk)

        stored = self._pipeline.partition.stored
        last = jnp.asarray([self._last in stages[:stored] for stages in self._pipeline.partition.stage_of])
        return when(last[lax.axis_index("pipe")], add, jnp.zeros((), jnp.float32))

    def _passes(self, row: Array, way: str, there: Array) -> tuple[Pass, Pass]:
        """The row's forward (``F``) or backward (``B``) pass through a stage's layers, if it is ``there``, and through
        the dense layers, if it is the first stage's."""
        stage = row[Col[f"{way}_STAGE"]]
        saved = Col.F_SAVE if way == "F" else Col.B_SAVED
        saved_first = Col.F_SAVE_FIRST if way == "F" else Col.B_SAVED_FIRST
        count = jnp.where(there, self._counts[stage], 0)
        dense = jnp.where(there & (stage == 0), self._n_dense, 0)
        return (
            Pass(row[Col[f"{way}_CHUNK"]] * self._slots, count, row[saved], row[Col.DEFERRED]),
            Pass(0, dense, row[saved_first]),
        )

    def _embedded(self, tokens: Array) -> Array:
        table = self._weights.params["embedding"]["table"]
        return table[jnp.maximum(tokens[:, :-1], 0)].astype(self.message.dtype)

    def _into_the_table(self, grads: Tree, dx: Array, row: Array, there: Array) -> Tree:
        """On the first stage, the gradient of :meth:`_embedded` added."""
        tokens = jnp.maximum(take(self._tokens, row[Col.B_MICRO])[:, :-1], 0)

        def change(table: Array) -> Array:
            return table.at[tokens].add(dx.astype(table.dtype))

        table = when(there & (row[Col.B_STAGE] == 0), change, grads["embedding"]["table"])
        return grads | {"embedding": {"table": table}}

    @property
    def _late(self) -> Tree:
        """Weights of what comes before and after the layers."""
        return {name: part for name, part in self._weights.params.items() if name not in ("dense", "moe")}

    def _end(self, grads: Tree, raw: Array, tokens: Array) -> tuple[Tree, Losses, Array]:
        """What comes after the last layer."""
        config = self._pipeline.config
        return add_end_gradients(self._model, self._late, grads, raw, tokens, config, **self._scalars)

    def _model(self, late_params: Tree) -> DeepSeekV3:
        """The model without the pipeline's layers."""
        dense = {name: wide(part) for name, part in self._weights.params.items() if name == "dense"}
        bias = {name: part for name, part in self._weights.router_bias.items() if name != "moe"}
        return merge_model(self._pipeline.ends, fp8.attach(dense | late_params, self._weights.codes), bias)

    def _from_the_loss(self, memory: _Memory, dy: Array, row: Array, there: Array) -> tuple[_Memory, Array]:
        """On the last stage, the gradient of the trunk's output, and losses and the weights' gradients added up.

        All are made here of the trunk's output, so that nothing else is kept for them.
        """

        def make(carry: Any) -> Any:
            grads, sums, _ = carry
            raw, tokens = take(memory["raw"], row[Col.B_SAVED_LAST]), take(self._tokens, row[Col.B_MICRO])
            grads, losses, d_raw = self._end(grads, raw, tokens)
            return grads, jax.tree.map(jnp.add, sums, losses), d_raw

        carry = memory["grads"], memory["losses"], dy
        grads, losses, dy = when(there & (row[Col.B_STAGE] == self._last), make, carry)
        return memory | {"grads": grads, "losses": losses}, dy

    def gradients(self, memory: _Memory) -> Tree:
        """All weights' gradients."""
        return memory["grads"] | {name: memory[name]["grads"] for name in ("dense", "moe") if name in memory}

    def losses(self, memory: _Memory) -> Losses:
        """This rank's part of the step's losses, and of the counts of all routers of the model."""
        end: Losses = memory["losses"]
        cost, counts = memory["moe"]["record"]
        balance = jnp.sum(cost) * self._d_cost
        layers = self._pipeline.config.model.n_moe_layers
        places = jnp.where(self._layers < 0, layers, self._layers)
        all_counts = jnp.zeros((layers, counts.shape[1]), counts.dtype).at[places].add(counts, mode="drop")
        if end.counts is not None:
            all_counts = jnp.concatenate([all_counts, end.counts])
        return Losses(end.total + balance, end.main, end.mtp, end.balance + balance, all_counts)
