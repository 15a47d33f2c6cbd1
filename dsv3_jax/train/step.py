"""The training step: one ``jax.jit`` holding one ``jax.shard_map`` over the whole mesh (design: one device is the mesh
(1, 1, 1), not a second path), and the evaluation step."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int32

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.model import DeepSeekV3, Tree, merge_model
from dsv3_jax.nn import fp8
from dsv3_jax.nn.balance import max_violation, relative_load, update_bias
from dsv3_jax.train import schedule
from dsv3_jax.train.loss import Losses, activation_dtype, cross_entropy, has_label, training_loss
from dsv3_jax.train.optimizer import clip_by_norm, make_optimizer
from dsv3_jax.train.pipeline import Pipeline, Weights, step_table
from dsv3_jax.train.state import TrainState, abstract_state, config_layout, config_mesh, graph_of, placed_model
from sharding.mesh import AXES, BATCH_AXES
from sharding.pipeline.ahead import forward_table
from sharding.zero import wide

Metrics = dict[str, Any]
_ROWS = P(None, BATCH_AXES)


class _Scalars(NamedTuple):
    """What the host decides anew each step: float32 numbers and an int32 count, traced inside the program."""

    learning_rate: Any
    mtp_weight: Any
    bias_update_speed: Any
    micro_batches: Any
    table: Any = ()
    """Rows of the pipeline's table and how many count: see :meth:`~dsv3_jax.train.pipeline.Pipeline.rows`."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one step on the devices, and what the host decided for it."""

    tokens: jax.Array
    """int32 [micro-batches, sequences of one, T + 1], shared out like the step's work."""
    scalars: _Scalars
    """Everywhere the same."""
    step: int
    """The step's number, from 1."""
    seen: int
    """Tokens after it."""
    learning_rate: float


class TrainStep:
    """``(state, rows) -> (state, metrics)``; the given state's buffers are used up.

    ``rows`` are int32 [n, T + 1] on the host: this process's share of the step's sequences, padding negative; or a
    :class:`Batch` that :meth:`place` made of them. The program is compiled once: a batch-size ramp changes how many
    micro-batches a loop runs, not its shapes.

    Metrics are device arrays, so that reading them is the caller's choice: ``loss`` (main cross entropy, nats),
    ``mtp_loss``, ``balance_loss``, ``grad_norm`` (before clipping), ``max_vio``, ``expert_load`` [routers, E] (1 is
    balance), ``skipped`` (this step's update was not finite and not applied), ``nonfinite`` (such steps in a row); and
    host numbers ``lr``, ``tokens``, ``step``.
    """

    def __init__(self, config: Config, mesh: Mesh | AbstractMesh | None = None):
        self.config = config
        self.mesh = mesh or config_mesh(config)
        self.lanes = int(np.prod([self.mesh.shape[axis] for axis in BATCH_AXES]))
        self.micro_batch = config.train.micro_batch_size or config.train.batch_size // self.lanes
        self.most_micro_batches = config.train.batch_size // (self.micro_batch * self.lanes)
        self._graph = graph_of(config)
        self._optimizer = make_optimizer(config.optim)
        self._layout = config_layout(config, self.mesh)
        self._pipeline: Pipeline | None = None
        if self._layout.partition is not None:
            largest = step_table(config, self.most_micro_batches)
            self._pipeline = Pipeline(config, placed_model(config), self._layout.partition, largest)
        state = abstract_state(config, self.mesh).arrays()
        specs, places = self._layout.specs(state), self._layout.shardings(state)
        mapped = jax.shard_map(
            self._local_step, mesh=self.mesh, in_specs=(specs, _ROWS, P()), out_specs=(specs, P()), check_vma=False
        )
        self.jitted: Any = jax.jit(mapped, donate_argnums=0, out_shardings=(places, None))
        self.program = self.jitted
        """What a call runs: ``jitted``, or a program that was compiled from it."""

    def __call__(self, state: TrainState, rows: "Int32[np.ndarray, 'n T1'] | Batch") -> tuple[TrainState, Metrics]:
        """One optimizer step.

        Raises:
            ValueError: a batch that was placed for another step.
        """
        batch = rows if isinstance(rows, Batch) else self.place(rows, state.step + 1, state.tokens)
        if batch.step != state.step + 1:
            raise ValueError(f"a batch for step {batch.step} was given to step {state.step + 1}")
        arrays, metrics = self.program(state.arrays(), batch.tokens, batch.scalars)
        state = TrainState(**arrays, step=batch.step, tokens=batch.seen)
        metrics |= {"lr": batch.learning_rate, "step": state.step, "tokens": state.tokens}
        return state, metrics

    def place(self, rows: Int32[np.ndarray, "n T1"], step: int, tokens: int) -> "Batch":
        """Sends the rows of step number ``step``, before which ``tokens`` tokens were seen, to the devices, and what
        the host decides for it. A run does so before the step before it: on the bus, what is small waits for what is
        large, such as the moving average's shares, and a step for both.

        Raises:
            ConfigError: rows that do not make whole micro-batches, or of another length than ``train.seq_len`` + 1.
        """
        config, lanes = self.config, self.lanes // jax.process_count()
        if rows.shape[1] != config.train.seq_len + 1:
            raise ConfigError(f"rows of {rows.shape[1]} tokens: train.seq_len = {config.train.seq_len} needs one more")
        per_micro = self.micro_batch * lanes
        count = rows.shape[0] // per_micro
        if rows.shape[0] % per_micro or not 0 < count <= self.most_micro_batches:
            raise ConfigError(
                f"a batch of {rows.shape[0]} sequences must be 1 to {self.most_micro_batches} times "
                f"{per_micro} (train.micro_batch_size x devices)"
            )
        micro = rows.reshape(count, per_micro, -1)
        micro = np.pad(micro, ((0, self.most_micro_batches - count), (0, 0), (0, 0)), constant_values=-1)
        scalars, everywhere = self._scalars(step, tokens, count), NamedSharding(self.mesh, P())
        return Batch(
            tokens=jax.make_array_from_process_local_data(NamedSharding(self.mesh, _ROWS), micro),
            scalars=jax.tree.map(lambda one: jax.make_array_from_process_local_data(everywhere, one), scalars),
            step=step,
            seen=tokens + rows.shape[0] * jax.process_count() * config.train.seq_len,
            learning_rate=float(scalars.learning_rate),
        )

    def arguments(self, state: TrainState, rows: Int32[np.ndarray, "n T1"]) -> tuple[Any, Any, _Scalars]:
        """What the compiled program is called with.

        Raises:
            ConfigError: as :meth:`place`.
        """
        batch = self.place(rows, state.step + 1, state.tokens)
        return state.arrays(), batch.tokens, batch.scalars

    def abstract_arguments(self) -> tuple[Any, Any, _Scalars]:
        """Shapes, dtypes and places of what the program is called with for a whole batch; nothing is allocated."""
        train, count = self.config.train, self.most_micro_batches
        shape = (count, self.micro_batch * self.lanes, train.seq_len + 1)
        rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.mesh, _ROWS))
        return abstract_state(self.config, self.mesh).arrays(), rows, self._scalars(1, 0, count)

    def _scalars(self, step: int, tokens: int, micro_batches: int) -> _Scalars:
        """Of step number ``step``, before which ``tokens`` tokens were seen."""
        config = self.config
        return _Scalars(
            np.float32(schedule.learning_rate(config, step, tokens)),
            np.float32(schedule.mtp_weight(config, tokens)),
            np.float32(schedule.bias_update_speed(config, tokens)),
            np.int32(micro_batches),
            self._pipeline.rows(step_table(config, micro_batches)) if self._pipeline else (),
        )

    def _local_step(self, arrays: Tree, tokens_ABT: jax.Array, scalars: _Scalars) -> tuple[Tree, Metrics]:
        """One device's part of a step, on its share of the state and of the rows."""
        config, layout = self.config, self._layout
        params, router_bias, opt_state = (arrays[name] for name in ("params", "router_bias", "opt_state"))
        with jax.named_scope("gather"):
            whole, codes = layout.gather(params)
            if self._pipeline is not None:
                whole, codes = self._pipeline.with_mirror(whole, codes)
        with jax.named_scope("gradients"):
            grads, losses = self._gradients(whole, codes, router_bias, tokens_ABT, scalars)
            losses = lax.psum(losses, AXES)
        with jax.named_scope("scatter"):
            if self._pipeline is not None:
                grads = self._pipeline.without_mirror(grads)
            grads = layout.scatter(grads)
        with jax.named_scope("optimizer"):
            grads, losses = _unscaled(grads, losses, loss_scale(config))
            norm = layout.global_norm(grads)
            grads = clip_by_norm(grads, norm, config.optim.grad_clip_norm)
            finite = jnp.isfinite(losses.total) & jnp.isfinite(norm)
            updates, new_opt = self._optimizer.update(grads, opt_state, params)
            new_params = jax.tree.map(lambda p, u: p - scalars.learning_rate * u, params, updates)
            new_bias = self._update_router_bias(router_bias, losses.counts, scalars.bias_update_speed)
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (new_params, new_bias, new_opt),
            (params, router_bias, opt_state),
        )
        nonfinite = (arrays["nonfinite"] + 1) * skipped
        metrics = {
            "loss": losses.main,
            "mtp_loss": losses.mtp,
            "balance_loss": losses.balance,
            "grad_norm": norm,
            "skipped": skipped,
            "nonfinite": nonfinite,
        }
        if losses.counts is not None:
            metrics |= {"max_vio": max_violation(losses.counts), "expert_load": relative_load(losses.counts)}
        new_arrays = dict(zip(("params", "router_bias", "opt_state"), kept, strict=True))
        return new_arrays | {"nonfinite": nonfinite}, metrics

    def _gradients(
        self, params: Tree, codes: Mapping[str, Any], router_bias: Tree, tokens_ABT: jax.Array, scalars: _Scalars
    ) -> tuple[Tree, Losses]:
        """This device's share of the step's gradients and losses, float32, summed over its micro-batches, and
        :func:`loss_scale` times as large.

        ``codes`` are the weights of FP8 products, made once for all micro-batches.
        """
        config = self.config
        label_total = lax.psum(jnp.sum(has_label(tokens_ABT), dtype=jnp.float32), BATCH_AXES)
        sequence_total = scalars.micro_batches.astype(jnp.float32) * (tokens_ABT.shape[1] * self.lanes)
        weighed = {
            "mtp_weight": scalars.mtp_weight,
            "label_total": jnp.maximum(label_total, 1.0),
            "sequence_total": sequence_total,
        }
        if (scale := loss_scale(config)) != 1.0:
            weighed |= {name: weighed[name] / scale for name in ("label_total", "sequence_total")}
        if self._pipeline is not None:
            weights = Weights(params, codes, router_bias)
            rows, ticks = scalars.table
            return self._pipeline.gradients(weights, tokens_ABT, rows, ticks, weighed)

        # A loop over layers reads stacks in float32, whole: made once for all micro-batches. Else they stay narrow.
        params = params if config.train.unroll else wide(params)

        def loss(params: Tree, tokens_BT: jax.Array) -> tuple[jax.Array, Losses]:
            model = merge_model(self._graph, fp8.attach(params, codes), router_bias)
            losses = training_loss(model, tokens_BT, config, **weighed)
            return losses.total, losses

        def micro_batch(tokens_BT: jax.Array) -> tuple[Tree, Losses]:
            grads, losses = jax.grad(loss, has_aux=True)(wide(params), tokens_BT)
            return grads, losses

        if tokens_ABT.shape[0] == 1:
            return micro_batch(tokens_ABT[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(micro_batch, tokens_ABT[0]))
        return lax.fori_loop(
            0,
            scalars.micro_batches,
            lambda i, total: jax.tree.map(jnp.add, total, micro_batch(tokens_ABT[i])),
            zeros,
        )

    def _update_router_bias(self, router_bias: Tree, counts: jax.Array | None, gamma: jax.Array) -> Tree:
        """Every router's bias moved by its own counts; the trunk's routers come first in ``counts``, MTP's after."""
        if counts is None or not router_bias:
            return router_bias
        rule = self.config.loss.bias_update_rule
        flat, treedef = jax.tree.flatten_with_path(router_bias)
        trunk = self.config.model.n_moe_layers
        updated = []
        for path, bias in flat:
            keys = [key.key for key in path]
            rows = counts[:trunk] if keys[0] == "moe" else counts[trunk + int(keys[1])]
            updated.append(update_bias(bias, rows, gamma, rule))
        return jax.tree.unflatten(treedef, updated)


def loss_scale(config: Config) -> float:
    """What losses of FP8 steps are multiplied by before they are differentiated, a power of two; 1 in other precisions.

    They are means over all labels of a step, so that gradients shrink as batches grow, while the quantizers' smallest
    scale is fixed (a largest magnitude of 1e-4, spec 11.3): below it, which attention's gradients reach at a few
    million labels, tiles no longer scale and codes become zeros. In float32 and bfloat16 the factor is exact. At 64
    times a sum over labels nearly all tiles of preset small, at initialization, lie between a few hundred times that
    magnitude and 448, up to which scales are at most 1 and ``pallas_kernels.permute`` requantizes in float16.
    """
    train = config.train
    return 2.0 ** (math.ceil(math.log2(train.batch_size * train.seq_len)) + 6) if train.precision == "fp8" else 1.0


def _unscaled(grads: Tree, losses: Losses, scale: float) -> tuple[Tree, Losses]:
    if scale == 1.0:
        return grads, losses
    numbers = {name: getattr(losses, name) / scale for name in ("total", "main", "mtp", "balance")}
    return jax.tree.map(lambda leaf: leaf / scale, grads), losses._replace(**numbers)


def make_train_step(config: Config, mesh: Mesh | None = None) -> TrainStep:
    """The step of a run, or of one's own loop: ``(state, rows) -> (state, metrics)``."""
    return TrainStep(config, mesh)


class EvalStep:
    """``(state, rows) -> (nats, labels)``: cross entropy of the main head summed over all labels, as host numbers."""

    def __init__(self, config: Config, mesh: Mesh | None = None):
        self.config = config
        self.mesh = mesh or config_mesh(config)
        self._graph = graph_of(config)
        lanes = int(np.prod([self.mesh.shape[axis] for axis in BATCH_AXES]))
        self._micro_batches = self.mesh.shape["pipe"]
        self._rows = (config.train.micro_batch_size or config.train.batch_size // lanes) * lanes
        self._layout = config_layout(config, self.mesh)
        self._pipeline: Pipeline | None = None
        if self._layout.partition is not None:
            ranks, twice = self._micro_batches, config.mesh.schedule == "dualpipev"
            ahead = forward_table(ranks, self._micro_batches, twice=twice)
            self._pipeline = Pipeline(config, placed_model(config), self._layout.partition, ahead)
        specs = (self._layout.share, P(), _ROWS)
        mapped = jax.shard_map(self._local_nats, mesh=self.mesh, in_specs=specs, out_specs=P(), check_vma=False)
        self._jitted = jax.jit(mapped)

    def __call__(self, state: TrainState, rows: Int32[np.ndarray, "n T1"]) -> tuple[float, int]:
        """``rows`` are the same whole array in every process."""
        padding = -rows.shape[0] % (self._micro_batches * self._rows)
        padded = np.pad(rows, ((0, padding), (0, 0)), constant_values=-1)
        batches = padded.reshape(-1, self._micro_batches, self._rows, rows.shape[1])
        sharding = NamedSharding(self.mesh, _ROWS)
        sums = []
        for batch in batches:
            tokens = jax.make_array_from_callback(batch.shape, sharding, lambda index, batch=batch: batch[index])
            sums.append(self._jitted(state.params, state.router_bias, tokens))
        return float(np.sum([float(nats) for nats in sums])), int(np.sum(rows[:, 1:] >= 0))

    def _local_nats(self, params: Tree, router_bias: Tree, tokens_ABT: jax.Array) -> jax.Array:
        params, codes = self._layout.gather(params)
        if self._pipeline is not None:
            return lax.psum(self._pipeline.nats(Weights(params, codes, router_bias), tokens_ABT), AXES)
        model: DeepSeekV3 = merge_model(self._graph, fp8.attach(wide(params), codes), router_bias)
        tokens = jnp.maximum(tokens_ABT[0], 0)
        hidden, _, _ = model.trunk(tokens[:, :-1], dtype=activation_dtype(self.config.train.precision))
        hidden = model.final_norm(hidden).reshape(-1, self.config.model.hidden_size)
        labels, weights = tokens[:, 1:].reshape(-1), has_label(tokens_ABT).astype(jnp.float32).reshape(-1)
        nats = cross_entropy(hidden, model.head_weight(), labels, weights, self.config.train.loss_chunk)
        return lax.psum(nats, AXES)


def make_eval_step(config: Config, mesh: Mesh | None = None) -> EvalStep:
    """The evaluation step of a run."""
    return EvalStep(config, mesh)


def out_of_memory(config: Config) -> str:
    """What to say when a step does not fit on its device."""
    train = config.train
    return (
        f"the device has too little memory for this step: lower train.micro_batch_size (now "
        f"{train.micro_batch_size or 'all at once'}), or set train.remat = 'paper' or 'full' (now {train.remat!r})"
    )
