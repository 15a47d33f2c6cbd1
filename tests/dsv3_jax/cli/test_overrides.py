"""``PRESET --section.field value``: parsed, converted and refused like the TOML it lies over."""

import dataclasses
import math

import pytest

from dsv3_jax.cli.overrides import parse_config, parse_options
from dsv3_jax.config import Config, ConfigError, Segment, load_config, preset_names


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a made-up command."""

    out: str = ""
    """Run folder of the made-up command."""
    json: bool = False
    count: int = 1
    most_words: int = 1


@dataclasses.dataclass(frozen=True)
class Strict:
    """One option that must be given."""

    checkpoint: str
    temperature: float = 1.0


def parse(*argv, **settings):
    return parse_config("dsv3 train", list(argv), "Train.", Options, **settings)


def refused(*argv, **settings):
    with pytest.raises(ConfigError) as caught:
        parse(*argv, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_preset_alone_is_that_preset():
    assert parse("tiny") == (load_config("tiny"), Options())


@pytest.mark.parametrize(
    ("argv", "section", "field", "value"),
    [
        (("--train.steps", "10"), "train", "steps", 10),
        (("--train.steps=10",), "train", "steps", 10),
        (("--train.batch-size", "64"), "train", "batch_size", 64),
        (("--train.batch_size", "64"), "train", "batch_size", 64),
        (("--train.tokens", "1e9"), "train", "tokens", 1e9),
        (("--optim.learning-rate", "1"), "optim", "learning_rate", 1.0),
        (("--train.precision", "bf16"), "train", "precision", "bf16"),
        (("--data.source", "3"), "data", "source", "3"),
        (("--data.source", "a b/-c"), "data", "source", "a b/-c"),
        (("--train.bigram-gate", "false"), "train", "bigram_gate", False),
        (("--model.tie-word-embeddings",), "model", "tie_word_embeddings", True),
        (("--loss.mtp-weight", "0.1"), "loss", "mtp_weight", (Segment(math.inf, 0.1),)),
        (
            ("--loss.mtp-weight", "[{ until = 1e9, value = 0.3 }, { until = inf, value = 0.1, shape = 'linear' }]"),
            "loss",
            "mtp_weight",
            (Segment(1e9, 0.3), Segment(math.inf, 0.1, "linear")),
        ),
        (("--optim.schedule", "[]"), "optim", "schedule", ()),
    ],
)
def test_a_flag_changes_its_field_and_no_other(argv, section, field, value):
    config, _ = parse("tiny", *argv)
    assert getattr(getattr(config, section), field) == value
    assert config == dataclasses.replace(
        load_config("tiny"),
        **{section: dataclasses.replace(getattr(load_config("tiny"), section), **{field: value})},
    )


def test_a_nested_field_is_reached_by_dots():
    config, _ = parse("tiny", "--model.rope-scaling.factor", "4")
    assert config.model.rope_scaling.factor == 4.0


def test_the_last_of_two_equal_flags_counts():
    assert parse("tiny", "--train.steps", "1", "--train.steps", "2")[0].train.steps == 2


def test_flags_may_stand_before_the_preset():
    config, options = parse("--json", "tiny", "--out", "runs/a")
    assert (config.name, options) == ("tiny", Options(out="runs/a", json=True))


def test_options_of_the_command_are_typed():
    assert parse("tiny", "--count", "3", "--json", "false")[1] == Options(count=3)


def test_a_file_is_a_preset_too(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "train/tiny"\n')
    assert parse(str(path))[0].name == "mine"


def test_a_default_preset_is_taken_when_none_is_named():
    assert parse("--train.steps", "3", default="tiny")[0].train.steps == 3


def test_model_only_prefers_the_released_architecture():
    assert parse("deepseek_v3", model_only=True)[0].model.rope_scaling.factor == 40
    assert parse("deepseek_v3")[0].model.rope_scaling.factor == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ("--train.step", "1"),
            "unknown option --train.step; did you mean '--train.steps'?; see `dsv3 train --help`",
        ),
        (("--steps", "1"), "unknown option --steps; did you mean '--train.steps'?; see `dsv3 train --help`"),
        (("--otu", "x"), "unknown option --otu; did you mean '--out'?; see `dsv3 train --help`"),
        (("-o", "x"), "unknown option -o; did you mean '--out'?; see `dsv3 train --help`"),
        (("--train.steps", "ten"), "train.steps = 'ten' must be a whole number"),
        (("--train.steps", "1.5"), "train.steps = 1.5 must be a whole number"),
        (("--optim.eps", "small"), "optim.eps = 'small' must be a number"),
        (("--train.bigram-gate=perhaps",), "train.bigram_gate = 'perhaps' must be true or false"),
        (("--train.remat", "ful"), "train.remat = 'ful' must be one of 'none', 'paper', 'full'; did you mean 'full'?"),
        (("--loss.mtp-weight", "[1"), "loss.mtp_weight = '[1' must be a number or a list of {until, value, shape}"),
        (("--train.steps",), "--train.steps needs a value"),
        (("--train.steps", "--json"), "--train.steps needs a value"),
        (("--most-words", "many"), "--most-words = 'many' must be a whole number"),
        (("--most_words", "many"), "--most-words = 'many' must be a whole number"),
        (("--count", "many"), "--count = 'many' must be a whole number"),
        (("extra",), "'extra' is not expected after the preset 'tiny'; see `dsv3 train --help`"),
        (("--model.n-group", "3"), "model.n_group = 3 must divide model.n_routed_experts = 16"),
        (("--mesh.data", "3"), "train.batch_size = 16 must be a multiple of mesh.expert x mesh.data = 3"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_right_thing(argv, expected):
    assert refused("tiny", *argv) == expected


def test_a_missing_preset_is_asked_for():
    message = refused()
    assert message.startswith("name a preset, as in `dsv3 train tiny`; there are ")


def _flags(cls, prefix="--"):
    for field in dataclasses.fields(cls):
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            yield from _flags(field.type, flag + ".")
        else:
            yield flag


def test_help_names_every_field_with_the_presets_value_and_all_presets(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("small", "--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for flag in _flags(Config):
        assert f"{flag} " in text
    for flag in _flags(Options):
        assert f"{flag} " in text
    assert "Run folder of the made-up command." in text
    assert "Tokens a sequence is trained on (T). (default: 1024)" in text
    assert all(name in text for name in preset_names())


@pytest.mark.parametrize(
    "argv",
    [
        ("--out", "runs/q", "small", "--help"),
        ("--out", "tiny", "small", "-h"),
        ("--help", "small", "--train.steps"),
        ("--json", "--help", "small"),
        ("nonsense", "small", "--help"),
        ("FILE", "--help"),
        ("--out", "tiny", "FILE", "--help"),
    ],
)
def test_help_shows_the_values_of_the_preset_or_file_that_is_named(argv, capsys, tmp_path):
    file = tmp_path / "ok.toml"
    file.write_text('base = "train/tiny"\nname = "[/b]"\n[train]\nseq_len = 1024\n[mesh]\npipe = 2\n')
    with pytest.raises(SystemExit) as stopped:
        parse(*(str(file) if word == "FILE" else word for word in argv))
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Tokens a sequence is trained on (T). (default: 1024)" in text


def test_help_of_a_file_that_is_not_there_is_one_line(tmp_path):
    assert refused("no/such.toml", "--help") == "config file 'no/such.toml' does not exist"


def test_help_of_a_command_without_a_preset_has_its_options_alone(capsys):
    with pytest.raises(SystemExit):
        parse_options("dsv3 generate", ["-h"], "Generate.", Strict)
    text = capsys.readouterr().out
    assert "--checkpoint STR" in text
    assert "--train.steps" not in text


def test_options_without_a_preset():
    found = parse_options("dsv3 generate", ["--checkpoint", "runs/a", "--temperature", "0"], "Generate.", Strict)
    assert found == Strict("runs/a", 0.0)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), "--checkpoint is missing"),
        (("--checkpoint", "a", "b"), "'b' is not expected; see `dsv3 generate --help`"),
        (
            ("--checkpoint", "a", "--temprature", "1"),
            "unknown option --temprature; did you mean '--temperature'?",
        ),
    ],
)
def test_options_that_are_missing_or_strange_are_one_line(argv, expected):
    with pytest.raises(ConfigError) as caught:
        parse_options("dsv3 generate", list(argv), "Generate.", Strict)
    assert str(caught.value).startswith(expected)
