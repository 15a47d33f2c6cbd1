"""Bytes of a training step on one device, by component, in closed form: nothing is compiled or allocated.

The state is exact: every array's share by the rules of :mod:`sharding.rules`. What the step adds is what is alive in
the backward pass when most is; XLA adds some buffers of its own.

Layers in a loop have stacks for all their gradients from the beginning of the backward pass, beside all activations.
Unrolled layers make gradients as they use activations up, so that of the two the larger counts (their sum changes
evenly from layer to layer); but their weights are cast once, all at the beginning, and stay.
"""

import math
from dataclasses import dataclass, field

from jax.sharding import PartitionSpec

from dsv3_jax.config import Config, ConfigError, ModelConfig
from dsv3_jax.planning.activations import (
    Tensors,
    Work,
    block_rows,
    computed_again,
    kept_by_block,
    put_off_by_block,
    rows_of_experts,
)
from dsv3_jax.planning.shapes import block_shapes, parameter_shapes, router_bias_shapes
from dsv3_jax.planning.stages import Schedule, Stages, stages_of
from sharding.expert_parallel import ExpertParallel
from sharding.rules import dims_of, model_spec, stacked_layers, zero_spec


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device. ``state`` is there between steps, ``step`` while one runs; ``host`` is in host memory, for
    each device."""

    mesh: dict[str, int]
    tokens: int
    """Of one micro-batch on one device."""
    micro_batches: int
    remat: str
    state: Tensors
    step: Tensors
    kept: dict[str, Tensors] = field(default_factory=dict)
    """Of one layer of each kind and one micro-batch: what it keeps for the backward pass."""
    host: Tensors = field(default_factory=dict)
    """The moving average, and a copy of as much on its way: parameters that come in, or an average being saved."""

    @property
    def arguments(self) -> int:
        """What the compiled step takes."""
        return sum(self.state.values())

    @property
    def temporaries(self) -> int:
        """What it needs beside them."""
        return sum(self.step.values())

    @property
    def total(self) -> int:
        """Both."""
        return self.arguments + self.temporaries

    @property
    def table(self) -> Tensors:
        """:attr:`total` in six rows: ``parameters`` (as the products read them), ``masters``, ``moments``,
        ``gradients``, ``activations`` (kept for the backward pass), ``workspace`` (all else)."""

        def part(*beginnings: str) -> int:
            return sum(size for name, size in (self.state | self.step).items() if name.startswith(beginnings))

        rows = {
            "parameters": part("gathered weights", "weights, cast"),
            "masters": part("masters"),
            "moments": part("moments"),
            "gradients": part("gradients of a micro-batch", "gradients in shares") + self.step.get("gradients", 0),
            "activations": part("activations of", "weight gradients put off"),
        }
        return rows | {"workspace": self.total - sum(rows.values())}


def plan_memory(config: Config, *, schedule: Schedule | None = None, gpu: bool = True) -> MemoryPlan:
    """What one device holds when ``config`` trains on its mesh.

    Args:
        config: the run; its ``mesh`` need not be there.
        schedule: of the pipeline, in place of ``mesh.schedule``; counts where ``mesh.pipe`` is above 1.
        gpu: cuDNN's attention and the Hopper kernels' blocks of rows, else the portable forms.

    Raises:
        ConfigError: the mesh does not fit the model; one line.
    """
    mesh, train, model = config.mesh, config.train, config.model
    sizes = {"pipe": mesh.pipe, "expert": mesh.expert, "data": mesh.data}
    if mesh.pipe > 1 and model.n_moe_layers < mesh.pipe:
        raise ConfigError(f"mesh.pipe = {mesh.pipe} must be at most the {model.n_moe_layers} mixture-of-experts layers")
    per_device = train.batch_size // (mesh.expert * mesh.data)
    sequences = train.micro_batch_size or per_device
    tokens = sequences * train.seq_len
    placement = ExpertParallel(mesh.expert, mesh.transport, mesh.capacity, mesh.node_size, mesh.fp8_dispatch)
    local = max(1, model.n_routed_experts // mesh.expert)
    work = Work(
        tokens=tokens,
        sequences=sequences,
        element=4 if train.precision == "fp32" else 2,
        placement=placement,
        block=block_rows(tokens * model.num_experts_per_tok, local, gpu=gpu),
        sequence_balance=config.loss.sequence_balance > 0,
        fused_attention=gpu and train.precision != "fp32",
        unroll=train.unroll,
        fp8=train.precision == "fp8",
    )
    try:
        return _plan(config, sizes, work, per_device // sequences, schedule or mesh.schedule)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclass
class _Weights:
    """Numbers of parameters on one device."""

    share: int = 0
    whole: int = 0
    """Of those that the model's code holds."""
    cast: int = 0
    """``whole`` that is kept whole and enters products in another type than float32."""
    gathered: Tensors = field(default_factory=dict)
    """Of those that are not kept whole, by whether they travel as ``bf16`` or ``fp32``."""
    parts: Tensors = field(default_factory=dict)
    """``whole`` by place: ``stage``, and what is at the pipeline's ``first`` or ``last`` end."""


def _weights(config: Config, sizes: dict[str, int], stages: Stages) -> _Weights:
    pipe, found = sizes["pipe"], _Weights()
    for path, shape in parameter_shapes(config.model).items():
        place = _PLACES.get(path.split("/")[0], "last")
        if place == "stage":
            shape = (pipe * stages.stored, *shape[1:])
        whole_spec = model_spec(path, shape, sizes)
        share_spec = zero_spec(shape, whole_spec, sizes, stacked_layers(path, len(shape)))
        whole, share = _part(shape, whole_spec, sizes), _part(shape, share_spec, sizes)
        if place == "stage":
            whole = whole // stages.stored * stages.held
        found.share += share
        found.whole += whole
        found.parts[place] = found.parts.get(place, 0) + whole
        float32 = config.train.precision == "fp32" or dims_of(path, len(shape))[-1] in ("norm", "router")
        if pipe == 1 and share_spec == whole_spec:
            found.cast += 0 if float32 else whole
        else:
            kind = "fp32" if float32 else "bf16"
            found.gathered[kind] = found.gathered.get(kind, 0) + whole
    return found


_PLACES = {"moe": "stage", "embedding": "first", "dense": "first"}


def _one_pass(weights: _Weights, stages: Stages, pipe: int) -> int:
    """Parameters whose gradients one backward pass makes: of everything, or of a chunk and the larger of the ends."""
    if pipe == 1:
        return weights.whole
    ends = max(weights.parts.get("first", 0), weights.parts.get("last", 0))
    return weights.parts.get("stage", 0) // stages.held * stages.chunk + ends


def _part(shape: tuple[int, ...], spec: PartitionSpec, sizes: dict[str, int]) -> int:
    """Entries of one device's part."""
    axes = [axis for part in spec if part is not None for axis in ((part,) if isinstance(part, str) else part)]
    return math.prod(shape) // math.prod(sizes[axis] for axis in axes)


def _plan(config: Config, sizes: dict[str, int], work: Work, micro_batches: int, schedule: Schedule) -> MemoryPlan:
    model, train = config.model, config.train
    stages = stages_of(model, sizes["pipe"], schedule, micro_batches, config.mesh.waiting)
    weights = _weights(config, sizes, stages)
    moment = 2 if config.optim.moment_dtype == "bfloat16" else 4
    biases = sum(
        math.prod(shape) * (stages.stored if path.startswith("moe/") else 1) // (shape[0] if len(shape) > 1 else 1)
        for path, shape in router_bias_shapes(model).items()
    )
    state = {
        "masters": 4 * weights.share,
        "moments": 2 * moment * weights.share,
        "router biases": 4 * biases,
        "batch": 4 * work.sequences * micro_batches * (train.seq_len + 1),
        "counters and scalars": 8 + 16,
    }
    kinds = [("dense", False)] * (model.n_dense_layers > 0) + [("moe", True)] * (model.n_moe_layers > 0)
    kept = {name: kept_by_block(model, work, train.remat, moe=moe) for name, moe in kinds}
    put_off = sum(put_off_by_block(model, work).values()) if model.n_moe_layers else 0
    backward = {
        "activations of MoE layers": stages.under_way * stages.chunk * sum(kept.get("moe", {}).values()),
        "activations of dense layers": stages.under_way_first
        * model.n_dense_layers
        * sum(kept.get("dense", {}).values()),
        "weight gradients put off": stages.put_off * stages.chunk * put_off,
        "activations of MTP": model.num_nextn_predict_layers * _mtp_kept(model, work, train.remat),
        **max(_head(config, work, pipe=sizes["pipe"] > 1), _layer_at_work(config, work), key=_size),
    }
    # The optimizer needs gradients summed and in shares when the activations are gone.
    update = {"gradients in shares": 4 * weights.share if weights.share < weights.whole else 0}
    pass_ = _one_pass(weights, stages, sizes["pipe"])
    whole = {
        "gradients": 4 * weights.whole,
        "gradients of a micro-batch": 4 * pass_ if micro_batches > 1 else 0,
    }
    # FP8 has a byte a number in each orientation, made once a step.
    cast = {"weights, cast": 2 * weights.cast if train.unroll or train.precision == "fp8" else 0}
    average = 4 * weights.share if train.ema_decay else 0
    step = {"gathered weights": _held(weights, sizes), "parameters copied for the EMA": average}
    if train.unroll:
        # Of several micro-batches the sum of gradients is carried along, their own come layer by layer.
        carried = {"gradients": whole["gradients"]} if micro_batches > 1 else {}
        made = {"gradients of a micro-batch": 4 * pass_} if micro_batches > 1 else {"gradients": 4 * pass_}
        step |= cast | carried
        step |= max(backward, made | _layer_at_work(config, work), carried | update, key=_size)
        step = dict.fromkeys(("gathered weights", "parameters copied for the EMA", "gradients"), 0) | step
    else:
        step |= cast | whole | max(backward, update, key=_size)
    host = {"EMA": average, "copies of it on their way": average}
    return MemoryPlan(sizes, work.tokens, micro_batches, train.remat, state, step, kept, host)


def _held(weights: _Weights, sizes: dict[str, int]) -> int:
    """Weights travel in the products' type; the unpipelined step widens them again on arrival, for the sake of
    gradients in float32."""
    wide = 4 if sizes["pipe"] == 1 else 2
    return 4 * weights.gathered.get("fp32", 0) + wide * weights.gathered.get("bf16", 0)


def _size(parts: Tensors) -> int:
    return sum(parts.values())


def _mtp_kept(model: ModelConfig, work: Work, remat: str) -> int:
    """A block with the two norms and the projection before it and the norm after it."""
    d, block = model.hidden_size, _size(kept_by_block(model, work, remat, moe=model.n_routed_experts > 0))
    if remat != "none":
        return block + work.tokens * work.element * d  # two inputs instead of one
    return block + work.tokens * (3 * (12 * d + 8) + 2 * d * work.element)


def _head(config: Config, work: Work, *, pipe: bool) -> Tensors:
    """The end of the forward pass. A pipeline's weights come cast."""
    model, depth = config.model, config.model.num_nextn_predict_layers
    d, vocab, heads = model.hidden_size, model.vocab_size, 1 + config.model.num_nextn_predict_layers
    chunk = min(config.train.loss_chunk, work.tokens)
    return {
        "head's norms, inputs and their gradients": heads * work.tokens * (12 + 3 * work.element) * d,
        "logits of a chunk": chunk * vocab * (4 + work.element),
        "head and table: casts and MTP's gradients": vocab
        * d
        * ((4 if work.element == 2 and not pipe else 0) + 8 * depth),
    }


def _layer_at_work(config: Config, work: Work) -> Tensors:
    """The largest layer's backward pass: what it computes again, gradients of activations, its weights cast, their
    gradients before they are stacked; and the rows that travel to its experts and back."""
    model = config.model
    kinds = ([False] if model.n_dense_layers else []) + ([True] if model.n_routed_experts else [])
    return max((_one_layer(model, work, config.train.remat, moe=moe) for moe in kinds), key=_size)


def _one_layer(model: ModelConfig, work: Work, remat: str, *, moe: bool) -> Tensors:
    attention = 2 * work.tokens * model.num_attention_heads * (model.qk_head_dim + model.value_head_dim)
    if moe:
        held, rows = rows_of_experts(model, work)
        ffn = rows * (2 * model.hidden_size + 3 * model.moe_intermediate_size)
        ways = 2 * held * model.hidden_size * work.element if work.placement.size > 1 else 0
    else:
        ffn, ways = 3 * work.tokens * model.intermediate_size, 0
    numbers = sum(
        math.prod(shape) // (work.placement.size if dims_of(path, len(shape))[0] == "expert" else 1)
        for path, shape in block_shapes(model, moe=moe).items()
    )
    weights = "a layer's gradients" if work.unroll else "a layer's weights, cast, and their gradients"
    return {
        "a layer computed again": computed_again(model, work, remat, moe=moe),
        "gradients of a layer's activations": max(attention, ffn) * work.element,
        weights: numbers * (4 if work.unroll else work.element + 4),
        "rows on their way to experts": ways,
    }
