"""A run folder gives back the weights that were asked for, or one line that says why not."""

import shutil

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint import CheckpointError
from dsv3_jax.config import ConfigError, replace
from dsv3_jax.interop.pretrained import from_pretrained
from dsv3_jax.model import split_model


@pytest.fixture(scope="module")
def config(run_config):
    return run_config({"ema_decay": 0.9}, num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, saved_run, config, tokenizer):
    return saved_run(tmp_path_factory.mktemp("runs") / "a", config, tokenizer, ema=True)


@pytest.fixture
def damaged_copy(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "copy")


def same(model, parts):
    _, params, router_bias = split_model(model)
    for got, wanted in ((params, parts.params), (router_bias, parts.router_bias)):
        assert jax.tree.structure(got) == jax.tree.structure(wanted)
        for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("arguments", "seed"),
    [({}, 30), ({"step": 10}, 10), ({"weights": "best"}, 20)],
)
def test_weights_are_of_the_checkpoint_asked_for(run_folder, drawn_parts, config, arguments, seed):
    same(from_pretrained(run_folder, **arguments).model, drawn_parts(config.model, seed))


def test_the_moving_average_comes_with_its_own_router_biases(run_folder, drawn_parts, config):
    parts = drawn_parts(config.model, 30)._replace(params=drawn_parts(config.model, 31).params)
    same(from_pretrained(run_folder, weights="ema").model, parts)


def test_configuration_and_tokenizer_come_along(run_folder, config, tokenizer):
    run = from_pretrained(str(run_folder))
    assert run.config == config
    assert run.model.config == config.model
    assert run.tokenizer.fingerprint == tokenizer.fingerprint


def test_one_checkpoint_is_a_run_too(run_folder, tmp_path, drawn_parts, config, tokenizer):
    alone = shutil.copytree(run_folder / "checkpoints" / "10", tmp_path / "alone")
    run = from_pretrained(alone)
    same(run.model, drawn_parts(config.model, 10))
    assert run.tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("path", "arguments", "words"),
    [
        ("nowhere", {}, ["nowhere", "does not exist", "dsv3 train"]),
        ("", {}, ["config.json", "checkpoints/"]),
        ("a", {"step": 15}, ["step = 15", "10, 20, 30"]),
        ("a", {"step": 10, "weights": "best"}, ["step = 10", "'best'"]),
        ("a/checkpoints/10", {"step": 10}, ["step = 10", "one checkpoint"]),
        ("a/checkpoints/10", {"weights": "best"}, ["'best'", "one checkpoint"]),
    ],
)
def test_a_mistake_is_one_line(run_folder, path, arguments, words):
    with pytest.raises(ConfigError) as caught:
        from_pretrained(run_folder.parent / path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_run_without_moving_average_or_validation_says_so(tmp_path, saved_run, config, tokenizer):
    folder = saved_run(tmp_path / "plain", replace(config, train={"ema_decay": 0.0}), tokenizer)
    with pytest.raises(ConfigError, match=r"train\.ema_decay = 0"):
        from_pretrained(folder, weights="ema")
    for step in (10, 20):
        shutil.rmtree(folder / "checkpoints" / str(step))
    with pytest.raises(ConfigError, match="has a validation"):
        from_pretrained(folder, weights="best")


def test_damage_is_named_and_nothing_older_is_taken_in_its_place(damaged_copy):
    (damaged_copy / "checkpoints" / "30" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"30 is damaged: tokenizer\.json .*20"):
        from_pretrained(damaged_copy)
