"""Presets and files become configurations, and come back from TOML unchanged."""

import dataclasses
import math
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import (
    Config,
    ConfigError,
    Schedule,
    Segment,
    differences,
    load_config,
    preset_folder,
    preset_names,
    replace,
    to_toml,
)

RECIPES = sorted(path.stem for path in (preset_folder() / "train").glob("*.toml"))
MODELS = sorted(path.stem for path in (preset_folder() / "model").glob("*.toml"))


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("model_only", [False, True])
def test_every_preset_comes_back_from_its_resolved_toml_unchanged(name, model_only, tmp_path):
    config = load_config(name, model_only=model_only)
    assert config.name == name
    assert load_config(write(tmp_path, "config.toml", to_toml(config))) == config


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(min_value=0, exclude_min=True, max_value=1e300))
def test_any_text_and_any_number_survive_the_resolved_toml(text, number):
    config = replace(Config(name="x" + text), data={"text_field": text}, optim={"learning_rate": number})
    assert load_config(tomllib.loads(to_toml(config))) == config


def test_issue_presets_all_exist():
    ours = {"tiny", "small", "bench_3b", "lfb_1b"}
    assert {name for name in MODELS if not name.startswith("deepseek_")} == ours
    published = {"v3", "v2", "v2_lite", "moe_16b", "llm_7b", "llm_67b"}
    assert {name.removeprefix("deepseek_") for name in MODELS} - ours == published
    assert set(MODELS) <= set(RECIPES)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_trains_the_model_of_its_name(name):
    released, trained = load_config(name, model_only=True).model, load_config(name).model
    assert dataclasses.replace(trained, rope_scaling=released.rope_scaling) == released


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite"])
def test_yarn_is_on_in_the_released_model_and_off_in_pre_training(name):
    assert load_config(name, model_only=True).model.rope_scaling.factor == 40
    assert load_config(name).model.rope_scaling.factor == 1


@pytest.mark.parametrize("name", ["deepseek_v3_32k", "deepseek_v3_128k"])
def test_v3_long_context_phases_keep_the_tokens_of_a_step(name):
    config = load_config(name)
    assert config.train.batch_size * config.train.seq_len == 62_914_560
    assert config.model == load_config("deepseek_v3", model_only=True).model
    assert (config.train.steps, config.train.tokens) == (1000, 0)
    assert (config.optim.learning_rate, config.optim.warmup_steps, config.optim.schedule) == (7.3e-6, 0, ())
    assert config.loss.bias_update_speed == (Segment(math.inf, 0.0),)
    assert config.loss.mtp_weight == (Segment(math.inf, 0.1),)
    assert config.train.batch_ramp == ()


def test_v3_recipe_is_the_published_one():
    config = load_config("deepseek_v3")
    train, optim, loss = config.train, config.optim, config.loss
    assert (train.tokens, train.seq_len, train.batch_size) == (14.8e12, 4096, 15360)
    assert train.batch_ramp == (Segment(0.0, 3072.0), Segment(469e9, 15360.0, "linear"))
    assert (optim.learning_rate, optim.warmup_steps, optim.grad_clip_norm) == (2.2e-4, 2000, 1.0)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.moment_dtype) == (0.9, 0.95, 0.1, "bfloat16")
    rates = [(piece.until, piece.value * optim.learning_rate, piece.shape) for piece in optim.schedule]
    assert [(until, pytest.approx(rate), shape) for until, rate, shape in rates] == [
        (10e12, 2.2e-4, "constant"),
        (14.3e12, 2.2e-5, "cosine"),
        (14.633e12, 2.2e-5, "constant"),
        (math.inf, 7.3e-6, "constant"),
    ]
    assert loss.bias_update_speed == (Segment(14.3e12, 0.001), Segment(math.inf, 0.0))
    assert loss.mtp_weight == (Segment(10e12, 0.3), Segment(math.inf, 0.1))
    assert loss.sequence_balance == 1e-4


def test_v2_recipe_has_its_three_losses_and_no_bias():
    loss = load_config("deepseek_v2").loss
    assert (loss.expert_balance, loss.device_balance, loss.communication_balance) == (0.003, 0.05, 0.02)
    assert (loss.balance_devices, loss.devices_per_token) == (8, 3)
    assert not load_config("deepseek_v2").model.has_router_bias


@pytest.mark.parametrize(
    ("name", "rate", "batch", "tokens"),
    [
        ("deepseek_v2", 2.4e-4, 9216, 8.1e12),
        ("deepseek_v2_lite", 4.2e-4, 4608, 5.7e12),
        ("deepseek_moe_16b", 4.2e-4, 4608, 106_449 * 4608 * 4096),
        ("deepseek_llm_7b", 4.2e-4, 2304, 2e12),
        ("deepseek_llm_67b", 3.2e-4, 4608, 2e12),
    ],
)
def test_other_recipes_have_their_published_rate_batch_and_tokens(name, rate, batch, tokens):
    config = load_config(name)
    assert (config.optim.learning_rate, config.train.batch_size, config.train.seq_len) == (rate, batch, 4096)
    assert (config.train.tokens or config.train.steps * batch * 4096) == tokens
    assert config.optim.warmup_steps == 2000
    assert [piece.shape for piece in config.optim.schedule] == ["constant"] * 3


def test_benchmark_recipe_is_the_peers():
    config = load_config("bench_3b")
    assert (config.train.micro_batch_size, config.train.seq_len, config.train.precision) == (4, 4096, "bf16")
    assert (config.train.remat, config.model.num_nextn_predict_layers) == ("none", 0)


def test_a_number_is_a_constant_schedule():
    config = load_config({"loss": {"mtp_weight": 0.2}})
    assert config.loss.mtp_weight == (Segment(math.inf, 0.2),)


def test_overrides_lie_over_the_preset_and_keep_its_other_fields():
    config = load_config("deepseek_v3", {"model": {"rope_scaling": {"factor": 8}}, "train": {"steps": 3}})
    assert config.model.rope_scaling.factor == 8.0
    assert config.model.rope_scaling.beta_fast == 32.0
    assert (config.train.steps, config.train.seq_len) == (3, 4096)


def test_a_mapping_may_name_a_base():
    config = load_config({"base": "train/tiny", "name": "mine", "train": {"steps": 3}})
    assert (config.name, config.train.steps, config.model) == ("mine", 3, load_config("tiny").model)


def test_a_file_may_stand_on_a_preset_or_on_a_file_beside_it(tmp_path):
    write(tmp_path, "below.toml", 'base = "model/tiny"\n[train]\nsteps = 5\nseed = 9\n')
    above = write(tmp_path, "above.toml", 'base = "below.toml"\n[train]\nsteps = 7\n')
    config = load_config(above)
    assert (config.name, config.train.steps, config.train.seed) == ("above", 7, 9)
    assert config.model == load_config("tiny").model


def test_a_list_in_a_file_above_replaces_the_one_below():
    assert load_config("deepseek_v3_32k").optim.schedule == ()


def test_differences_name_each_field_once_with_both_values():
    old = load_config("tiny")
    new = replace(old, train={"steps": 700}, data={"source": "corpus"})
    found = differences(old, new)
    assert found == ['data.source: "python" -> "corpus"', "train.steps: 500 -> 700"]
    assert differences(old, old) == []


def refused(source, **overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("section", "field", "value", "expected"),
    [
        ("model", "hiden_size", 3, "unknown field model.hiden_size; did you mean 'hidden_size'?"),
        ("model", "hidden_size", "wide", "model.hidden_size = 'wide' must be a whole number"),
        ("model", "hidden_size", 1.5, "model.hidden_size = 1.5 must be a whole number"),
        ("model", "hidden_size", True, "model.hidden_size = True must be a whole number"),
        ("model", "norm_topk_prob", 1, "model.norm_topk_prob = 1 must be true or false"),
        ("model", "rope_scaling", 40, "model.rope_scaling = 40 must be a section of fields"),
        ("model", "rope_scaling", {"factr": 40}, "unknown field model.rope_scaling.factr; did you mean 'factor'?"),
        ("data", "source", 3, "data.source = 3 must be text"),
        ("optim", "learning_rate", "3e-4", "optim.learning_rate = '3e-4' must be a number"),
        (
            "train",
            "precision",
            "bf61",
            "train.precision = 'bf61' must be one of 'fp32', 'bf16', 'fp8'; did you mean 'bf16'?",
        ),
        ("loss", "mtp_weight", "0.3", "loss.mtp_weight = '0.3' must be a number or a list of {until, value, shape}"),
        ("loss", "mtp_weight", [{"until": 3}], "loss.mtp_weight[0].value is missing"),
        ("loss", "mtp_weight", [3], "loss.mtp_weight[0] = 3 must be a section of fields"),
    ],
)
def test_a_field_that_cannot_be_is_one_line_naming_it(section, field, value, expected):
    assert refused("tiny", **{section: {field: value}}) == expected


def test_an_unknown_section_is_named_with_the_nearest():
    assert refused("tiny", modle={"x": 1}) == "unknown field modle; did you mean 'model'?"


def test_an_unknown_preset_is_named_with_the_nearest_and_all_that_there_are():
    message = refused("tinny")
    assert message.startswith("preset 'tinny' is not known; did you mean 'tiny'?; there are ")
    assert all(name in message for name in preset_names())


def test_a_missing_file_is_named():
    assert refused("no/such.toml") == "config file 'no/such.toml' does not exist"


def test_text_that_is_not_toml_names_the_file_and_the_place(tmp_path):
    path = write(tmp_path, "broken.toml", "[model\nhidden_size = 3\n")
    message = refused(path)
    assert message.startswith(f"config file {path.resolve()} is not TOML: ")
    assert "line 1" in message


def test_bytes_that_are_not_text_are_refused_as_toml(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(bytes(range(256)))
    assert refused(path).startswith(f"config file {path.resolve()} is not TOML: ")


def test_an_unknown_base_is_named_with_the_nearest(tmp_path):
    message = refused(write(tmp_path, "a.toml", 'base = "model/tinny"\n'))
    assert message == "base = 'model/tinny' in a.toml does not exist; did you mean 'model/tiny'?"


def test_two_bases_are_refused(tmp_path):
    message = refused(write(tmp_path, "a.toml", 'base = ["model/tiny", "train/tiny"]\n'))
    assert message == "base = ['model/tiny', 'train/tiny'] in a.toml must be one name, such as 'model/tiny'"


def test_bases_that_come_back_to_themselves_are_refused(tmp_path):
    write(tmp_path, "b.toml", 'base = "x/../x/a.toml"\n')
    path = write(tmp_path, "x/a.toml", 'base = "../b.toml"\n')
    assert refused(path) == "base: a.toml comes back to itself through a.toml -> b.toml"


def test_schedule_type_is_a_tuple_of_segments():
    assert Schedule == tuple[Segment, ...]
