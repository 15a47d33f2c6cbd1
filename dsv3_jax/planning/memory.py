"""Bytes of a training step on one device, by component, in closed form: nothing is compiled or allocated.

The state is exact: every array's share by the rules of :mod:`sharding.rules`. What the step adds is what is alive in
the backward pass when most is; XLA adds some buffers of its own.

Layers in a loop have stacks for all their gradients from the beginning of the backward pass, beside all activations.
Unrolled layers make gradients as they use activations up, so that of the two the larger counts (their sum changes
evenly from layer to layer); but their weights are cast once, all at the beginning, and stay until the stack's last
layer has read them, backwards. Of FP8's codes one orientation is let go of after the forward pass.
"""

import math
from dataclasses import dataclass, field

from jax.sharding import PartitionSpec

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.planning.activations import Tensors, Work, block_rows, kept_by_block
from dsv3_jax.planning.at_work import (
    forward_at_work,
    head_at_work,
    layer_at_work,
    mtp_kept,
    numbers_of_layer,
    size_of,
)
from dsv3_jax.planning.carried import carried_by_ticks, pass_at_work
from dsv3_jax.planning.shapes import parameter_shapes, router_bias_shapes
from dsv3_jax.planning.stages import Schedule, Stages, stages_of
from sharding.expert_parallel import ExpertParallel
from sharding.rules import model_spec, stacked_layers, travels_as, zero_spec


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
    carried: Tensors = field(default_factory=dict)
    """Of a pipeline: what its ticks carry, also where another moment of the step takes more and ``step`` is of that."""
    host: Tensors = field(default_factory=dict)
    """The moving average, a share of the parameters that comes in, and the copy that a checkpoint is written from."""

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
        unroll=train.unroll and mesh.pipe == 1,
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
    """Of those that are not kept whole, by whether they travel as ``bf16``, ``fp32`` or ``fp8``."""
    codes: int = 0
    """Bytes of those that travel as ``fp8``: codes in both orientations, padded, and their scales."""
    forward_again: int = 0
    """Bytes of FP8 codes that the products of the forward pass read which are computed again."""
    mirrored: int = 0
    """Of ``whole``, what another rank's share of the gradients holds: DualPipe's mirror copy."""


def _weights(config: Config, sizes: dict[str, int], stages: Stages) -> _Weights:
    pipe, found = sizes["pipe"], _Weights()
    for path, shape in parameter_shapes(config.model).items():
        staged = path.startswith("moe/")
        if staged:
            shape = (pipe * stages.stored, *shape[1:])
        whole_spec = model_spec(path, shape, sizes)
        share_spec = zero_spec(shape, whole_spec, sizes, stacked_layers(path, len(shape)))
        whole, share = _part(shape, whole_spec, sizes), _part(shape, share_spec, sizes)
        if staged:
            found.mirrored += whole // stages.stored * (stages.held - stages.stored)
            whole = whole // stages.stored * stages.held
        found.share += share
        found.whole += whole
        kind = travels_as(path, len(shape), config.train.precision)
        if pipe == 1 and share_spec == whole_spec:
            found.cast += 0 if kind == "fp32" else whole
            codes = 2 * whole
        else:
            found.gathered[kind] = found.gathered.get(kind, 0) + whole
            codes = _codes(shape[-2:], whole)
            found.codes += codes if kind == "fp8" else 0
        if kind == "fp8" and _product_again(path, config.train.remat):
            found.forward_again += codes // 2
    return found


def _product_again(path: str, remat: str) -> bool:
    """Whether a block's backward pass repeats the product of the weight at ``path``: with the paper's set those of
    MLA's up-projections, else all but the last one."""
    attention_up = path.endswith(("q_up/kernel", "kv_up/kernel"))
    return remat != "none" and (attention_up if remat == "paper" else "/down" not in path)


def _codes(matrix: tuple[int, ...], numbers: int) -> int:
    """A byte a number in each of two orientations, padded to tiles of 128 x 128, and a float32 scale for each."""
    tiles = math.prod(-(-size // 128) for size in matrix) * (numbers // math.prod(matrix))
    return 2 * tiles * (128 * 128 + 4)


def _part(shape: tuple[int, ...], spec: PartitionSpec, sizes: dict[str, int]) -> int:
    """Entries of one device's part."""
    axes = [axis for part in spec if part is not None for axis in ((part,) if isinstance(part, str) else part)]
    return math.prod(shape) // math.prod(sizes[axis] for axis in axes)


def _plan(config: Config, sizes: dict[str, int], work: Work, micro_batches: int, schedule: Schedule) -> MemoryPlan:
    model, train = config.model, config.train
    stages = stages_of(model, sizes["pipe"], schedule, micro_batches, config.mesh.waiting, config.mesh.lag)
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
    average = 4 * weights.share if train.ema_decay else 0
    # One share of it travels down; one has come up and one is coming.
    share = average // train.ema_every
    host = {"EMA": average, "a share of it on its way": share, "a copy of it, being saved": average}
    held = _held(weights, narrow=sizes["pipe"] > 1 or train.unroll)
    step = {"gathered weights": held, "EMA: copied parameters, two shares": average + 2 * share}
    if sizes["pipe"] > 1:
        carried = carried_by_ticks(config, work, stages, weights.whole)
        ticks = carried | pass_at_work(config, work)
        after = {"gradients": 4 * weights.whole, "mirror's gradients on their way": 8 * weights.mirrored}
        after |= {"gradients in shares": 4 * weights.share}
        step |= {"weights, cast": weights.codes} | max(ticks, after, key=size_of)
        return MemoryPlan(sizes, work.tokens, micro_batches, train.remat, state, step, kept, carried, host)
    activations = _activations(kept, model.n_moe_layers, model.n_dense_layers)
    activations["activations of MTP"] = model.num_nextn_predict_layers * mtp_kept(model, work, train.remat)
    # The optimizer needs gradients summed and in shares when the activations are gone.
    update = {"gradients in shares": 4 * weights.share if weights.share < weights.whole else 0}
    whole = {
        "gradients": 4 * weights.whole,
        "gradients of a micro-batch": 4 * weights.whole if micro_batches > 1 else 0,
    }
    # FP8 has a byte a number in each orientation, made once a step.
    cast = {"weights, cast": weights.codes + (2 * weights.cast if train.unroll or train.precision == "fp8" else 0)}
    if train.unroll:
        # Of several micro-batches the sum of gradients is carried along, their own come layer by layer; and all casts
        # are read again. Of one, a backward pass reads FP8's codes in one orientation, and what it computes again.
        again = micro_batches > 1
        carried = {"gradients": whole["gradients"]} if again else {}
        name = "gradients of a micro-batch" if again else "gradients"
        late = cast
        if work.fp8 and not again:
            late = {"weights, cast": cast["weights, cast"] // 2 + weights.forward_again}
        (kept_by_one, all_but_one), (kept_by_two, all_but_two) = (
            _far_back(config, work, weights.whole, kept, number) for number in (1, 2)
        )
        layer = layer_at_work(config, work)
        # Of the table and of the head they are zeros in their whole size before the first is made.
        activations |= {name: 4 * model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)}
        step |= carried
        step |= max(
            cast | activations | {"experts' rows of the forward pass": forward_at_work(model, work)},
            late | activations | max(head_at_work(config, work), layer, key=size_of),
            late | {name: all_but_two} | kept_by_two | layer,
            # The first layer's products are the last to read the stack's casts.
            (late if again else {}) | {name: all_but_one} | kept_by_one | layer,
            (late if again else {}) | {name: 4 * weights.whole},
            (late if again else {}) | update,
            key=size_of,
        )
        first = ("gathered weights", "EMA: copied parameters, two shares", "gradients", "weights, cast")
        step = dict.fromkeys((name for name in first if name in step), 0) | step
    else:
        backward = activations | max(head_at_work(config, work), layer_at_work(config, work), key=size_of)
        step |= cast | whole | max(backward, update, key=size_of)
    return MemoryPlan(sizes, work.tokens, micro_batches, train.remat, state, step, kept, host=host)


def _activations(kept: dict[str, Tensors], moe: int, dense: int) -> Tensors:
    """What so many layers of each kind keep."""
    return {
        "activations of MoE layers": moe * size_of(kept.get("moe", {})),
        "activations of dense layers": dense * size_of(kept.get("dense", {})),
    }


def _far_back(config: Config, work: Work, whole: int, kept: dict[str, Tensors], at_work: int) -> tuple[Tensors, int]:
    """Late in the backward pass, when layer number ``at_work`` of the large stack is at work, the first being 1: what
    it and the layers before it keep, and bytes of the gradients of all layers behind it."""
    model = config.model
    moe, dense = min(at_work, model.n_moe_layers), min(at_work, model.n_dense_layers)
    if moe:
        dense = model.n_dense_layers
    kinds = ((True, moe), (False, dense))
    to_come = sum(layers * numbers_of_layer(model, work, moe=kind) for kind, layers in kinds if layers)
    return _activations(kept, moe, dense), 4 * (whole - to_come)


def _held(weights: _Weights, *, narrow: bool) -> int:
    """Weights travel in the products' type and stay so, but for those that a loop over layers reads: it takes stacks in
    float32, for the sake of gradients in it."""
    return 4 * weights.gathered.get("fp32", 0) + (2 if narrow else 4) * weights.gathered.get("bf16", 0)
