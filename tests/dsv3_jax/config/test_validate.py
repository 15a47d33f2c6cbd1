"""What cannot be is refused before anything is compiled: one line with the field, its value and what would be right."""

import math

import pytest

from dsv3_jax.config import ConfigError, Segment, load_config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # shapes
        ({"vocab_size": 0}, "model.vocab_size = 0 must be greater than 0"),
        ({"hidden_size": -128}, "model.hidden_size = -128 must be greater than 0"),
        ({"init_std": 0.0}, "model.init_std = 0.0 must be greater than 0"),
        ({"q_lora_rank": -1}, "model.q_lora_rank = -1 must not be negative"),
        (
            {"num_key_value_heads": 2},
            "model.num_key_value_heads = 2 must equal model.num_attention_heads = 4 with 'mla'",
        ),
        (
            {"attention": "mha", "num_key_value_heads": 3},
            "model.num_key_value_heads = 3 must divide model.num_attention_heads = 4",
        ),
        ({"eos_token_id": 2048}, "model.eos_token_id = 2048 must be less than model.vocab_size = 2048"),
        # RoPE
        ({"qk_rope_head_dim": 15}, "model.qk_rope_head_dim = 15 must be even: RoPE turns pairs of channels"),
        ({"attention": "mha", "head_dim": 33}, "model.head_dim = 33 must be even: RoPE turns pairs of channels"),
        ({"rope_scaling": {"factor": 0.5}}, "model.rope_scaling.factor = 0.5 must be at least 1 (1 is plain RoPE)"),
        (
            {"rope_scaling": {"beta_fast": 1, "beta_slow": 32}},
            "model.rope_scaling.beta_fast = 1.0 must be at least beta_slow = 32.0 > 0",
        ),
        # experts
        (
            {"num_experts_per_tok": 17},
            "model.num_experts_per_tok = 17 must be at most model.n_routed_experts = 16",
        ),
        ({"num_experts_per_tok": 0}, "model.num_experts_per_tok = 0 must be greater than 0"),
        ({"n_group": 3}, "model.n_group = 3 must divide model.n_routed_experts = 16"),
        ({"topk_group": 5}, "model.topk_group = 5 must be at most model.n_group = 4"),
        (
            {"topk_group": 1, "num_experts_per_tok": 5},
            "model.num_experts_per_tok = 5 does not fit in topk_group = 1 groups of 4",
        ),
        (
            {"topk_method": "greedy"},
            "model.topk_method = 'greedy' has no groups: set n_group = 1 (it is 4) or 'group_limited_greedy'",
        ),
        (
            {"n_group": 16, "topk_group": 16},
            "model.n_group = 16 leaves one expert a group; 'noaux_tc' scores a group by its two best",
        ),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(changes, expected):
    refused({"model": changes}, expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"seq_len": 1}}, "train.seq_len = 1 must exceed the MTP depth 1"),
        (
            {"train": {"seq_len": 8192}},
            "train.seq_len = 8192 must be at most model.max_position_embeddings = 4096",
        ),
        ({"train": {"batch_size": 0}}, "train.batch_size = 0 must be greater than 0"),
        ({"train": {"steps": -1}}, "train.steps = -1 must not be negative"),
        ({"train": {"seed": 2**32}}, "train.seed = 4294967296 must be less than 2**32"),
        ({"train": {"tokens": math.inf}}, "train.tokens = inf must be a finite number"),
        ({"optim": {"learning_rate": math.nan}}, "optim.learning_rate = nan must be a finite number"),
        ({"loss": {"mtp_weight": math.inf}}, "loss.mtp_weight[0].value = inf must be finite and not negative"),
        ({"train": {"ema_decay": 1.0}}, "train.ema_decay = 1.0 must be at least 0 and less than 1"),
        (
            {"train": {"batch_ramp": 64}},
            "train.batch_ramp[0].value = 64 must be at most train.batch_size = 16",
        ),
        (
            {"train": {"batch_ramp": 8}},
            "train.micro_batch_size = 0 must be greater than 0 with train.batch_ramp: a ramp adds micro-batches of one "
            "size",
        ),
        ({"optim": {"learning_rate": 0.0}}, "optim.learning_rate = 0.0 must be greater than 0"),
        ({"optim": {"beta2": 1.0}}, "optim.beta2 = 1.0 must be at least 0 and less than 1"),
        (
            {"train": {"steps": 0}},
            "optim.schedule_unit = 'fraction' needs the run's length: set train.steps or train.tokens",
        ),
        ({"data": {"fim_rate": 1.5}}, "data.fim_rate = 1.5 must be between 0 and 1"),
        ({"data": {"source": ""}}, "data.source is empty: name a file or folder, or 'python'"),
        (
            {"loss": {"device_balance": 0.1, "balance_devices": 3}},
            "loss.balance_devices = 3 must divide model.n_routed_experts = 16",
        ),
        (
            {"loss": {"devices_per_token": 2}},
            "loss.devices_per_token = 2 must be at most loss.balance_devices = 1",
        ),
        (
            {"loss": {"mtp_weight": [{"until": 3, "value": 1}, {"until": 2, "value": 1}]}},
            "loss.mtp_weight[1].until = 2.0 must not come before 3.0",
        ),
        (
            {"loss": {"mtp_weight": [{"until": 3, "value": -1}]}},
            "loss.mtp_weight[0].value = -1.0 must be finite and not negative",
        ),
        (
            {"optim": {"schedule": [{"until": 1, "value": 1, "shape": "cosine"}]}},
            "optim.schedule[0].shape = 'cosine' has nothing before it: start with a constant piece",
        ),
        # mesh
        (
            {"mesh": {"pipe": 2}, "model": {"n_routed_experts": 0}},
            "mesh.pipe = 2 must be 1: stages share out mixture-of-experts layers, and this model has none",
        ),
        (
            {"mesh": {"pipe": 2, "lag": 3}},
            "mesh.lag = 3 must be 1 (messages travel between ticks) or 2 (beside the next tick)",
        ),
        (
            {"mesh": {"pipe": 2, "waiting": -2}},
            "mesh.waiting = -2 must be -1 (as many weight gradients as the schedule puts off), 0 or more",
        ),
        (
            {"mesh": {"pipe": 3, "schedule": "dualpipe"}},
            "mesh.schedule = 'dualpipe' needs an even mesh.pipe, not 3: micro-batches enter at both ends",
        ),
        (
            {"mesh": {"pipe": 2, "schedule": "dualpipev"}, "train": {"micro_batch_size": 8}},
            "mesh.schedule = 'dualpipev' on 2 ranks needs 4 micro-batches at least, not 2 "
            "(train.batch_size over mesh.expert x mesh.data x train.micro_batch_size)",
        ),
        ({"mesh": {"data": 0}}, "mesh.data = 0 must be greater than 0"),
        ({"mesh": {"data": 3}}, "train.batch_size = 16 must be a multiple of mesh.expert x mesh.data = 3"),
        (
            {"mesh": {"data": 2}, "train": {"micro_batch_size": 5}},
            "train.micro_batch_size = 5 must divide the 8 sequences of one device "
            "(train.batch_size = 16 over mesh.expert x mesh.data = 2)",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused(changes, expected):
    refused(changes, expected)


def refused(changes, expected):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", changes)
    assert str(caught.value) == expected


def test_a_dense_model_needs_no_sensible_expert_fields():
    config = load_config("tiny", {"model": {"n_routed_experts": 0, "num_experts_per_tok": 99}})
    assert config.model.n_dense_layers == config.model.num_hidden_layers


def test_a_ramp_starts_where_its_first_piece_says():
    ramp = [{"until": 0, "value": 8}, {"until": 1e6, "value": 16, "shape": "linear"}]
    config = load_config("tiny", {"train": {"batch_ramp": ramp, "micro_batch_size": 4}})
    assert config.train.batch_ramp == (Segment(0.0, 8.0), Segment(1e6, 16.0, "linear"))


def test_endless_pieces_are_allowed():
    pieces = [{"until": math.inf, "value": 1}]
    assert load_config("tiny", {"optim": {"schedule": pieces}}).optim.schedule[0].until == math.inf
