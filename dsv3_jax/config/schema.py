"""What a run is made of: frozen dataclasses, one section each, every field with its unit.

Field names of :class:`ModelConfig` are DeepSeek's own (the ``config.json`` of the published checkpoints), so that
a reader can lay the two side by side. Everything else in the repository uses the names of ``pallas_kernels/dims.py``.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Segment:
    """One piece of a schedule over consumed tokens.

    ``constant`` holds ``value`` until ``until``; ``linear`` and ``cosine`` go from the previous piece's value to
    ``value``, reached at ``until``. A first piece with ``until = 0`` sets where a ramp starts.
    """

    until: float
    """Where this piece ends: consumed tokens, or a share of the run when the section says ``fraction``."""
    value: float
    """Value held, or reached at the end of the piece."""
    shape: Literal["constant", "linear", "cosine"] = "constant"


Schedule = tuple[Segment, ...]


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (spec 4.4). ``factor = 1`` is plain RoPE."""

    factor: float = 1.0
    """How many times longer sequences get; 1 is plain RoPE."""
    original_max_position_embeddings: int = 4096
    """Tokens a sequence had in pre-training, which ``factor`` stretches."""
    beta_fast: float = 32.0
    """Turns over the original length from which a channel keeps its frequency."""
    beta_slow: float = 1.0
    """Turns below which a channel is slowed by the whole ``factor``."""
    mscale: float = 1.0
    """Factor in the cosines' and sines' scale, over that of ``mscale_all_dim``."""
    mscale_all_dim: float = 1.0
    """Factor in the attention's softmax scale; 0 leaves it alone."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture. Defaults are a small complete DeepSeek-V3; presets state every field that matters to them."""

    vocab_size: int = 2048
    """Rows of the embedding and columns of the head (V)."""
    hidden_size: int = 128
    """Width of the residual stream (D)."""
    num_hidden_layers: int = 4
    """Layers of the trunk, without MTP (L)."""
    first_k_dense_replace: int = 1
    """The first layers, whose FFN is dense; all others are mixture-of-experts layers."""
    intermediate_size: int = 512
    """Width of a dense FFN."""

    attention: Literal["mla", "mha"] = "mla"
    """``mla`` latent attention; ``mha`` the plain (or grouped-query) attention of the dense and MoE-16B models."""
    num_attention_heads: int = 4
    """Query heads (N)."""
    num_key_value_heads: int = 4
    """Heads of K and V with ``mha`` (fewer than query heads: GQA). Equal to the query heads with ``mla``."""
    head_dim: int = 32
    """Head dimension with ``mha``."""
    q_lora_rank: int = 64
    """Query latent; 0 means the query is not compressed (V2-Lite)."""
    kv_lora_rank: int = 32
    """Latent of keys and values (C), what a token leaves in the cache beside its RoPE key."""
    qk_nope_head_dim: int = 32
    """Part of a query's and key's head without RoPE (U)."""
    qk_rope_head_dim: int = 16
    """Part with RoPE (R); one key of it serves all heads."""
    v_head_dim: int = 32
    """Head dimension of values with ``mla`` (W)."""

    n_routed_experts: int = 16
    """Experts that a router chooses from (E); 0 makes a dense model."""
    n_shared_experts: int = 1
    """Experts that every token goes to, as one network of so many times the width."""
    num_experts_per_tok: int = 4
    """Routed experts of a token (K)."""
    moe_intermediate_size: int = 64
    """Width of one expert (I)."""
    n_group: int = 1
    """Groups that the experts are dealt into (G); 1 has none."""
    topk_group: int = 1
    """Groups that a token's experts may come from."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity of a token and an expert from the router's logit: V3's, or V2's."""
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    """``noaux_tc`` has the per-expert selection bias (V3); the other two do not (V2, MoE-16B)."""
    norm_topk_prob: bool = True
    """Whether a token's gate values are divided by their sum (V3)."""
    routed_scaling_factor: float = 2.5
    """What gate values are multiplied by."""

    num_nextn_predict_layers: int = 1
    """Depth of multi-token prediction; 0 leaves the MTP modules out."""
    mtp_concat: Literal["embedding_first", "hidden_first"] = "embedding_first"
    """Order of eh_proj's two inputs: the released weights' order, or that printed in the paper (spec 7.2)."""
    mtp_hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """The trunk's hidden state that MTP reads: after or before the final norm (UNCONFIRMED, spec 7.2)."""

    max_position_embeddings: int = 4096
    """Longest sequence, tokens."""
    rope_theta: float = 10000.0
    """Base of RoPE's frequencies."""
    rope_interleave: bool = True
    """RoPE pairs adjacent channels (DeepSeek's checkpoints) or the two halves (llama layout)."""
    rope_scaling: RopeScaling = RopeScaling()
    """YaRN, for sequences longer than in pre-training."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm but the two of the latents, which have 1e-6 in any model."""
    init_std: float = 0.006
    """Standard deviation of every weight matrix and of the embedding at the start."""
    init_distribution: Literal["normal", "truncated_normal"] = "normal"
    """UNCONFIRMED in the paper (spec 3)."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding's transpose."""
    bos_token_id: int = 0
    """Opens prompts."""
    eos_token_id: int = 1
    """Ends documents and answers."""

    @property
    def n_moe_layers(self) -> int:
        """Mixture-of-experts layers of the trunk."""
        return self.num_hidden_layers - self.n_dense_layers

    @property
    def n_dense_layers(self) -> int:
        """Layers of the trunk with a dense FFN."""
        return (
            min(self.first_k_dense_replace, self.num_hidden_layers) if self.n_routed_experts else self.num_hidden_layers
        )

    @property
    def has_router_bias(self) -> bool:
        """Whether routers carry the selection bias of auxiliary-loss-free balancing."""
        return self.n_routed_experts > 0 and self.topk_method == "noaux_tc"

    @property
    def qk_head_dim(self) -> int:
        """Query/key head dimension H."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Value head dimension W."""
        return self.v_head_dim if self.attention == "mla" else self.head_dim


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    source: str = "python"
    """``python`` (the standard library's sources and documentation that this Python ships), or a file or folder of
    .txt, .md, .py, .rst, .jsonl and .array_record files."""
    text_field: str = "text"
    """The key that holds a document's text in JSONL and in ArrayRecord files of JSON."""
    tokenizer: str = "train"
    """``train`` a byte-level BPE on the run's own corpus, or the path of a tokenizer.json."""
    tokenizer_bytes: int = 8_000_000
    """Bytes of the train split that a new tokenizer is trained on; 0 takes all."""
    val_fraction: float = 0.05
    """Share of documents (files) held out for validation."""
    max_bytes: int = 0
    """Bytes of the train split used, taken by a seeded choice of documents; 0 takes all."""
    fim_rate: float = 0.1
    """Share of documents turned into fill-in-the-middle, PSM form (spec 9.2)."""
    fim_cuts: Literal["characters", "tokens"] = "characters"
    """Where such a document may be cut, each place equally likely: between characters, so that models learn to go on
    inside a word, or between the tokens of the whole document (spec 9.2, UNCONFIRMED)."""
    split_rate: float = 0.1
    """Share of tokens joining punctuation and line breaks that are split (spec 9.3; share UNCONFIRMED)."""
    pack_window: int = 256
    """Documents tokenized and packed together by best fit. Rows that hold many documents need many to stay full: places
    left empty are not learned, but are routed and counted as tokens are. The first row waits for all of them: with
    documents as long as books choose fewer."""
    shards: int = 1
    """Parts that the train split is dealt into; row k of the stream is the next of part k mod ``shards``. Part of the
    order of rows, so the same for any number of processes, which must divide it."""
    seed: int = 0
    """Of the split, the choice of documents and the tokenizer's sample; ``train.seed`` orders the stream."""
    workers: int = 1
    """Threads that prepare rows ahead of the step."""
    prefetch: int = 8
    """Batches kept ready."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, how often."""

    steps: int = 0
    """Optimizer steps of the run; 0 lets ``tokens`` decide."""
    tokens: float = 0.0
    """Tokens of the run; the run ends at ``steps`` or ``tokens``, whichever comes first, 0 being no limit."""
    seq_len: int = 128
    """Tokens a sequence is trained on (T)."""
    batch_size: int = 16
    """Sequences an optimizer step sees on all devices together."""
    batch_ramp: Schedule = ()
    """Sequences a step over consumed tokens, up to ``batch_size``, in whole micro-batches; empty is constant."""
    micro_batch_size: int = 0
    """Sequences of one forward and backward pass on one device; 0 takes all of the device's at once."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Type of activations and matrix products; fp8 is bf16 with the linear layers of attention, networks and experts in
    8 bits (spec 11). Master weights and their gradients are float32 in all."""
    remat: Literal["none", "paper", "full"] = "none"
    """What the backward pass computes again: nothing; norms, MLA up-projections and SwiGLU (spec 12); each block."""
    unroll: bool = False
    """Layers as so many copies of the program, not as a loop over stacked weights: nothing is copied into stacks and
    out of them, at the price of compile time that grows with depth."""
    loss_chunk: int = 2048
    """Tokens whose float32 logits exist at one time."""
    seed: int = 0
    """Of the first weights, and of the order of the training text."""
    ema_decay: float = 0.0
    """Decay of the moving average of parameters, which is kept in host memory; 0 keeps none (decay UNCONFIRMED in the
    paper)."""
    ema_every: int = 1
    """Steps between two updates of the moving average, each with ``ema_decay ** ema_every``; one part in so many of it
    crosses the bus beside each step, in both directions: more than 1 where steps wait for that, which the run says."""
    log_every: int = 10
    """Steps between two readings of the metrics by the host. Every step is written to metrics.jsonl all the same."""
    eval_every: int = 100
    """Steps between two validations."""
    eval_sequences: int = 64
    """Validation sequences of one evaluation; 0 leaves validation out."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the best by validation."""
    max_nonfinite_steps: int = 10
    """Steps with a non-finite loss or gradient, one after another, that stop the run."""
    init_from: str = ""
    """Run folder whose newest weights a new run starts from (the next phase of a recipe), one checkpoint of it, or a
    Hugging Face folder."""
    bigram_gate: bool = False
    """End with status 1 when validation does not beat a bigram model over the tokens that the run consumed."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the learning rate."""

    learning_rate: float = 3e-4
    """Peak."""
    warmup_steps: int = 2000
    """Linear from 0, in steps, the first step counted as 1."""
    schedule: Schedule = ()
    """Factor of ``learning_rate`` over consumed tokens; empty is constant."""
    schedule_unit: Literal["tokens", "fraction"] = "tokens"
    """Whether ``until`` in ``schedule`` counts tokens or is a share of the run."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of its second."""
    eps: float = 1e-8
    """UNCONFIRMED in the paper."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: matrices only (UNCONFIRMED in the paper), or norms too."""
    grad_clip_norm: float = 1.0
    """Global norm; 0 does not clip."""
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of both Adam moments; the arithmetic is float32 in either."""


@dataclass(frozen=True)
class LossConfig:
    """What is added to cross entropy, and the bias update that balances experts without a loss."""

    mtp_weight: Schedule = (Segment(float("inf"), 0.3),)
    """Lambda of the MTP loss over consumed tokens (spec 7.1)."""
    bias_update_speed: Schedule = (Segment(float("inf"), 0.001),)
    """Gamma of the router bias update over consumed tokens (spec 6.1)."""
    bias_update_rule: Literal["sign", "error"] = "sign"
    """``b += gamma * sign(mean - count)``, or the proportional variant for softmax routers, whose error is the share of
    the mean load (spec 6.1)."""
    sequence_balance: float = 1e-4
    """Alpha of V3's sequence-wise balance loss (spec 6.2)."""
    balance_indicator: Literal["affinity", "selected"] = "affinity"
    """Whose top-K the load f counts: the raw affinities as printed, or the experts really selected."""
    expert_balance: float = 0.0
    """Alpha 1 of V2's expert-level loss (spec 6.3)."""
    device_balance: float = 0.0
    """Alpha 2 of V2's device-level loss."""
    communication_balance: float = 0.0
    """Alpha 3 of V2's communication loss."""
    balance_devices: int = 1
    """D of the two device losses: routed experts are taken as spread evenly over so many devices."""
    devices_per_token: int = 1
    """M of the communication loss."""


@dataclass(frozen=True)
class MeshConfig:
    """Named mesh axes; their product is the number of devices."""

    pipe: int = 1
    """Ranks of the pipeline, which share out the layers."""
    expert: int = 1
    """Ranks that share out the experts; each has sequences of its own."""
    data: int = 1
    """Ranks that have the same weights and other sequences; what the optimizer keeps is shared out over them."""
    schedule: Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    """Of the pipeline, where ``pipe`` is above 1; see ``sharding.pipeline``. ``dualpipe`` holds two chunks of the model
    on each device; ``dualpipev`` cuts the model into twice as many stages, two a device."""
    waiting: int = -1
    """Most passes of a device whose weight gradients may wait at one time, under the schedules that put them off
    (``zb1p``, ``dualpipe``, ``dualpipev``); -1 is as many as the schedule puts off, half as many as there are stages
    under the two-way ones. Each waiting pass keeps its layers' activations and their gradients; ``dsv3 plan pipeline``
    shows what a bound saves and costs."""
    lag: int = 1
    """Ticks of a pipeline's schedule from what a stage computes to its use on a neighbour. 1: messages travel between
    two ticks, in which neighbours wait for each other. 2: they travel beside the next tick, and a schedule takes more
    ticks in which ranks wait less: see ``sharding.pipeline.simulate.lockstep``."""
    cluster: str = ""
    """Preset of configs/cluster whose layout gives the axes that are not given otherwise."""
    transport: Literal["padded", "counted", "ring", "two_hop"] = "counted"
    """How tokens get to experts on other devices; see ``sharding.expert_parallel.ExpertParallel``."""
    capacity: float = 2.0
    """Room of ``counted`` and ``two_hop`` in one round, over the balanced load. Nothing is ever dropped: what does not
    fit goes in a further round, and costs a further exchange in that layer. At 2 an axis of two devices has room for
    the worst case and never needs one; early in training less room means further rounds in most layers."""
    node_size: int = 0
    """Consecutive devices of the expert axis that make a node, for ``two_hop``; 0 is 8, or half of an axis below 16."""
    fp8_dispatch: bool = False
    """Tokens travel to their experts as FP8 with power-of-two scales (spec 12)."""

    @property
    def devices(self) -> int:
        """All of them."""
        return self.pipe * self.expert * self.data

    @property
    def sends_beside(self) -> bool:
        """Whether messages between stages are to travel beside computation."""
        return self.pipe > 1 and self.lag == 2


@dataclass(frozen=True)
class AxesConfig:
    """Sizes of the mesh axes."""

    pipe: int
    expert: int
    data: int


@dataclass(frozen=True)
class ClusterConfig:
    """A machine of GPUs, for its mesh and for plans. Rates are of one device, in one direction, decimal units."""

    name: str
    nodes: int
    devices_per_node: int
    device: str
    """Part of JAX's ``device_kind``, such as ``H800``."""
    memory_gb: float
    bf16_tflops: float
    """Peak of dense products."""
    fp8_tflops: float
    hbm_gb_per_s: float
    """Of a device's own memory."""
    intra_node_gb_per_s: float
    """To another device of the node (NVLink), as achieved where it was measured."""
    inter_node_gb_per_s: float
    """To another node (InfiniBand)."""
    layout: AxesConfig
    """The mesh that suits it."""

    @property
    def devices(self) -> int:
        """All of them."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True)
class Config:
    """A complete run."""

    name: str = "custom"
    """Of the preset, or of your own; runs, tables and plans are told by it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


class ConfigError(ValueError):
    """The user's mistake, told in one line: the field, its value, and what would be right."""


def replace(config: Config, **sections: dict[str, object]) -> Config:
    """A copy with fields changed by section: ``replace(config, train={"steps": 10})``."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)
