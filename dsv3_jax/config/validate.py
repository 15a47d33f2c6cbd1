"""What cannot be, found before anything is compiled: each mistake one line naming field, value and remedy."""

import dataclasses
import math

from dsv3_jax.config.schema import Config, ConfigError, ModelConfig, Schedule
from dsv3_jax.config.supported import supported


def validate(config: Config, *, trainable: bool = True) -> None:
    """Raise :class:`ConfigError` for the first thing in ``config`` that cannot be, or cannot be trained yet.

    ``trainable = False`` lets through what plans alone know: pipelines whose schedule the batch is too small for.
    """
    _finite(config)
    validate_model(config.model)
    _validate_train(config)
    for name, schedule in (
        ("train.batch_ramp", config.train.batch_ramp),
        ("optim.schedule", config.optim.schedule),
        ("loss.mtp_weight", config.loss.mtp_weight),
        ("loss.bias_update_speed", config.loss.bias_update_speed),
    ):
        _validate_schedule(name, schedule)
    _validate_optim(config)
    _validate_data(config)
    _validate_loss(config)
    _positive("mesh", config.mesh, "pipe", "expert", "data")
    _not_negative("mesh", config.mesh, "capacity", "node_size")
    reason = supported(config, trainable=trainable)
    _require(reason is None, reason or "")


def _require(good: bool, message: str) -> None:
    if not good:
        raise ConfigError(message)


def _finite(config: Config) -> None:
    for section in ("model", "data", "train", "optim", "loss", "mesh"):
        owner = getattr(config, section)
        for field in dataclasses.fields(owner):
            value = getattr(owner, field.name)
            good = not isinstance(value, float) or math.isfinite(value)
            _require(good, f"{section}.{field.name} = {value} must be a finite number")


def _positive(section: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value > 0, f"{section}.{name} = {value} must be greater than 0")


def _not_negative(section: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value >= 0, f"{section}.{name} = {value} must not be negative")


def _share(section: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(0 <= value < 1, f"{section}.{name} = {value} must be at least 0 and less than 1")


def validate_model(model: ModelConfig) -> None:
    """Raise :class:`ConfigError` for an architecture that cannot be."""
    _positive(
        "model",
        model,
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
        "init_std",
    )
    _not_negative(
        "model", model, "first_k_dense_replace", "q_lora_rank", "num_nextn_predict_layers", "n_routed_experts"
    )
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if model.attention == "mla":
        _positive("model", model, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        _require(
            model.qk_rope_head_dim % 2 == 0,
            f"model.qk_rope_head_dim = {model.qk_rope_head_dim} must be even: RoPE turns pairs of channels",
        )
        _require(
            kv_heads == heads,
            f"model.num_key_value_heads = {kv_heads} must equal model.num_attention_heads = {heads} with 'mla'",
        )
    else:
        _positive("model", model, "head_dim")
        _require(
            model.head_dim % 2 == 0, f"model.head_dim = {model.head_dim} must be even: RoPE turns pairs of channels"
        )
        _require(
            heads % kv_heads == 0,
            f"model.num_key_value_heads = {kv_heads} must divide model.num_attention_heads = {heads}",
        )
    if model.n_dense_layers:
        _positive("model", model, "intermediate_size")
    scaling = model.rope_scaling
    _require(scaling.factor >= 1, f"model.rope_scaling.factor = {scaling.factor} must be at least 1 (1 is plain RoPE)")
    _require(
        scaling.beta_fast >= scaling.beta_slow > 0,
        f"model.rope_scaling.beta_fast = {scaling.beta_fast} must be at least beta_slow = {scaling.beta_slow} > 0",
    )
    _positive("model.rope_scaling", scaling, "original_max_position_embeddings")
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(model, name)
        _require(
            0 <= value < model.vocab_size,
            f"model.{name} = {value} must be less than model.vocab_size = {model.vocab_size}",
        )
    if model.n_routed_experts:
        _validate_experts(model)


def _validate_experts(model: ModelConfig) -> None:
    experts, chosen = model.n_routed_experts, model.num_experts_per_tok
    groups, kept = model.n_group, model.topk_group
    _positive(
        "model", model, "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group", "routed_scaling_factor"
    )
    _not_negative("model", model, "n_shared_experts")
    _require(
        chosen <= experts,
        f"model.num_experts_per_tok = {chosen} must be at most model.n_routed_experts = {experts}",
    )
    _require(experts % groups == 0, f"model.n_group = {groups} must divide model.n_routed_experts = {experts}")
    _require(kept <= groups, f"model.topk_group = {kept} must be at most model.n_group = {groups}")
    _require(
        chosen <= kept * (experts // groups),
        f"model.num_experts_per_tok = {chosen} does not fit in topk_group = {kept} groups of {experts // groups}",
    )
    if groups > 1:
        _require(
            model.topk_method != "greedy",
            f"model.topk_method = 'greedy' has no groups: set n_group = 1 (it is {groups}) or 'group_limited_greedy'",
        )
        _require(
            model.topk_method != "noaux_tc" or experts // groups >= 2,
            f"model.n_group = {groups} leaves one expert a group; 'noaux_tc' scores a group by its two best",
        )


def _validate_schedule(name: str, schedule: Schedule) -> None:
    last = 0.0
    for i, piece in enumerate(schedule):
        _require(piece.until >= last, f"{name}[{i}].until = {piece.until} must not come before {last}")
        _require(0 <= piece.value < math.inf, f"{name}[{i}].value = {piece.value} must be finite and not negative")
        last = piece.until
    if schedule and schedule[0].shape != "constant":
        raise ConfigError(f"{name}[0].shape = {schedule[0].shape!r} has nothing before it: start with a constant piece")


def _validate_train(config: Config) -> None:
    train = config.train
    _positive(
        "train",
        train,
        "seq_len",
        "batch_size",
        "loss_chunk",
        "ema_every",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "max_nonfinite_steps",
    )
    _not_negative("train", train, "steps", "tokens", "micro_batch_size", "eval_sequences", "seed")
    _require(train.seed < 2**32, f"train.seed = {train.seed} must be less than 2**32")
    _share("train", train, "ema_decay")
    _require(
        train.seq_len > config.model.num_nextn_predict_layers,
        f"train.seq_len = {train.seq_len} must exceed the MTP depth {config.model.num_nextn_predict_layers}",
    )
    longest = config.model.max_position_embeddings
    _require(
        train.seq_len <= longest,
        f"train.seq_len = {train.seq_len} must be at most model.max_position_embeddings = {longest}",
    )
    for i, piece in enumerate(train.batch_ramp):
        _require(
            piece.value <= train.batch_size,
            f"train.batch_ramp[{i}].value = {piece.value:g} must be at most train.batch_size = {train.batch_size}",
        )
    _require(
        not train.batch_ramp or train.micro_batch_size > 0,
        f"train.micro_batch_size = {train.micro_batch_size} must be greater than 0 with train.batch_ramp: a ramp adds "
        "micro-batches of one size",
    )


def _validate_optim(config: Config) -> None:
    optim = config.optim
    _positive("optim", optim, "learning_rate", "eps")
    _not_negative("optim", optim, "warmup_steps", "weight_decay", "grad_clip_norm")
    _share("optim", optim, "beta1", "beta2")
    needs_end = optim.schedule and optim.schedule_unit == "fraction"
    _require(
        not needs_end or config.train.steps > 0 or config.train.tokens > 0,
        "optim.schedule_unit = 'fraction' needs the run's length: set train.steps or train.tokens",
    )


def _validate_data(config: Config) -> None:
    data = config.data
    _share("data", data, "val_fraction")
    for name in ("fim_rate", "split_rate"):
        value = getattr(data, name)
        _require(0 <= value <= 1, f"data.{name} = {value} must be between 0 and 1")
    _positive("data", data, "pack_window", "prefetch", "shards")
    _not_negative("data", data, "tokenizer_bytes", "max_bytes", "workers", "seed")
    _require(bool(data.source), "data.source is empty: name a file or folder, or 'python'")
    _require(bool(data.tokenizer), "data.tokenizer is empty: 'train', or the path of a tokenizer.json")


def _validate_loss(config: Config) -> None:
    loss, experts = config.loss, config.model.n_routed_experts
    _not_negative("loss", loss, "sequence_balance", "expert_balance", "device_balance", "communication_balance")
    _positive("loss", loss, "balance_devices", "devices_per_token")
    if loss.device_balance or loss.communication_balance:
        _require(
            experts % loss.balance_devices == 0,
            f"loss.balance_devices = {loss.balance_devices} must divide model.n_routed_experts = {experts}",
        )
    _require(
        loss.devices_per_token <= loss.balance_devices,
        f"loss.devices_per_token = {loss.devices_per_token} must be at most "
        f"loss.balance_devices = {loss.balance_devices}",
    )
