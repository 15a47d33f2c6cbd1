"""Whole runs of a very small model: resume, interruption, damage, full disk, non-finite steps, refused settings."""

import dataclasses
import functools
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from dsv3_jax.checkpoint import CheckpointError, list_checkpoints, newest_checkpoint, read_info, restore
from dsv3_jax.cli import train as command
from dsv3_jax.config import ConfigError, Segment, load_config, replace, to_toml
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model import split_model
from dsv3_jax.train import finish, trainer
from dsv3_jax.train.ema import abstract_average
from dsv3_jax.train.step import TrainStep
from dsv3_jax.train.trainer import RunError, train

ROOT = Path(__file__).resolve().parents[3]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
STEPS = 12
ON_CHECKPOINT_8 = """
import os, signal, sys
from dsv3_jax import checkpoint
from dsv3_jax.model import split_model
from dsv3_jax.train import finish, trainer
from dsv3_jax.config import load_config
inventory = checkpoint._inventory
def die_at_8(folder):
    if folder.name == ".8.partial":
        with open(sys.argv[2] + "/metrics.jsonl", "a") as stream:
            stream.write('{"step": 9, "tok')
        os.kill(os.getpid(), signal.SIGKILL)
    return inventory(folder)
checkpoint._inventory = die_at_8
trainer.train(load_config(sys.argv[1]), sys.argv[2])
"""


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """Every run here has the same programs: they are compiled once, quickly, for subprocesses too."""
    folder = str(tmp_path_factory.mktemp("programs"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def one_compiled_step(monkeypatch):
    """Runs of one configuration share the traced programs too; only what is drawn at the end is left out."""
    monkeypatch.setattr(trainer, "make_train_step", MAKE_TRAIN_STEP)
    monkeypatch.setattr(trainer, "make_eval_step", MAKE_EVAL_STEP)
    monkeypatch.setattr(finish, "write_plots", lambda *args: [])


MAKE_TRAIN_STEP = functools.cache(trainer.make_train_step)
MAKE_EVAL_STEP = functools.cache(trainer.make_eval_step)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for i in range(40):
        lines = [" ".join(rng.choices(WORDS, k=12)) + "." for _ in range(10)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return load_config(
        {
            "name": "micro",
            "model": {
                "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "first_k_dense_replace": 0,
                "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8,
                "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4,
                "n_shared_experts": 0, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "init_std": 0.05,
                "num_nextn_predict_layers": 0,
            },
            "data": {"source": str(folder)},
            "train": {
                "steps": STEPS, "seq_len": 16, "batch_size": 4, "eval_every": 4, "eval_sequences": 6,
                "checkpoint_every": 4, "log_every": 3, "ema_decay": 0.9, "bigram_gate": True,
            },
            "optim": {"warmup_steps": 2, "learning_rate": 1e-2},
        }
    )  # fmt: skip


def _train(config, out, **settings):
    """A run, and what it printed."""
    console = Console(file=io.StringIO(), width=500)
    run = train(config, out, console=console, **settings)
    return run, console.file.getvalue()


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """The run that nothing interrupts."""
    return _train(config, tmp_path_factory.mktemp("run") / "reference")


def _curve(run):
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in run.metrics]


@functools.cache
def _average(checkpoint):
    """The moving average of a checkpoint."""
    config = load_config(str(checkpoint / "config.toml"))
    return restore(checkpoint, {"ema": abstract_average(config)}, partial=True)["ema"]


def _same_run(run, reference):
    """The same curve, loads and final state, bit for bit, the moving average too."""
    assert _curve(run) == _curve(reference)
    for ours, theirs in zip(run.expert_load, reference.expert_load, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, run.state, dataclasses.replace(reference.state))
    assert (run.state.step, run.state.tokens) == (reference.state.step, reference.state.tokens)
    jax.tree.map(np.testing.assert_array_equal, _average(run.checkpoint), _average(reference.checkpoint))
    for key in ("val_bpb", "bigram_consumed_bpb", "bigram_full_bpb", "gzip_bpb"):
        assert run.summary[key] == reference.summary[key]


def test_a_run_leaves_what_scripts_rely_on(config, reference):
    run, printed = reference
    assert load_config(str(run.out / "config.toml")) == config
    assert [record["step"] for record in run.metrics] == list(range(1, STEPS + 1))
    assert [record["tokens"] for record in run.metrics] == [64 * step for step in range(1, STEPS + 1)]
    names = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "max_vio", "skipped", "balance_loss"}
    assert all(names <= record.keys() for record in run.metrics)
    assert [record["step"] for record in run.metrics if "val_bpb" in record] == [4, 8, 12]
    assert [int(path.name) for path in list_checkpoints(run.out / "checkpoints")] == [8, 12]
    assert {path.name for path in run.plots} == {"loss.png", "expert_load.png", "max_vio.png"}
    steps, loads = run.expert_load
    assert steps.tolist() == [3, 6, 9, 12]
    assert loads.shape == (4, 1, 4)
    np.testing.assert_allclose(loads.mean(axis=-1), 1.0, rtol=1e-3)
    assert run.summary == json.loads((run.out / "summary.json").read_text())
    assert run.summary["val_bpb"] == run.metrics[-1]["val_bpb"]
    assert "=== sample 1" in (run.out / "samples.txt").read_text()
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"] - 0.5
    assert "step 12/12  loss" in printed
    assert "gzip -9" in printed


def test_a_model_worse_than_bigram_ends_with_status_1_and_only_where_asked(config, reference, tmp_path):
    run, printed = reference
    assert run.summary["val_bpb"] > run.summary["bigram_consumed_bpb"] > 0
    assert run.status == 1
    assert "NOT beaten" in printed
    shutil.copytree(run.out, tmp_path / "run")
    again, _ = _train(replace(config, train={"bigram_gate": False}), tmp_path / "run")
    assert again.status == 0
    _same_run(again, run)


def test_a_run_stopped_between_checkpoints_goes_on_exactly(config, reference, tmp_path):
    first, printed = _train(config, tmp_path / "run", stop_after=5)
    assert (first.status, first.state.step, first.summary) == (130, 5, {})
    assert "the same command goes on from step 5" in printed
    second, printed = _train(config, tmp_path / "run")
    assert f"going on from {tmp_path / 'run' / 'checkpoints' / '5'}" in printed
    _same_run(second, reference[0])


def test_a_run_killed_while_a_checkpoint_is_written_goes_on_exactly(config, reference, tmp_path, compile_cache):
    out = tmp_path / "run"
    (tmp_path / "config.toml").write_text(to_toml(config))
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": compile_cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "PYTHONPATH": str(ROOT),
    }
    argv = [sys.executable, "-c", ON_CHECKPOINT_8, str(tmp_path / "config.toml"), str(out)]
    killed = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["4"]
    assert (out / "metrics.jsonl").read_text().endswith('{"step": 9, "tok')
    _same_run(_train(config, out)[0], reference[0])
    assert not list((out / "checkpoints").glob(".*"))


class _At:
    """A training step that does something before one of its steps."""

    def __init__(self, monkeypatch, step, action):
        call = TrainStep.__call__

        def acting(self, state, rows):
            if state.step + 1 == step:
                action()
            return call(self, state, rows)

        monkeypatch.setattr(TrainStep, "__call__", acting)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_with_status_130(config, reference, tmp_path, monkeypatch, number, capfd):
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        _At(patched, 6, lambda: os.kill(os.getpid(), number))
        run, _ = _train(config, tmp_path / "run")
    assert (run.status, run.state.step) == (130, 6)
    assert run.checkpoint is not None
    assert run.checkpoint.name == "6"
    assert "saving after this step" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    if number == signal.SIGTERM:
        _same_run(_train(config, tmp_path / "run")[0], reference[0])


def test_a_second_ctrl_c_stops_at_once_and_loses_nothing_saved(config, reference, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        _At(patched, 7, twice)
        with pytest.raises(KeyboardInterrupt):
            _train(config, tmp_path / "run")
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["4"]
    _same_run(_train(config, tmp_path / "run")[0], reference[0])


def test_a_finished_run_can_be_made_longer(config, reference, tmp_path):
    shutil.copytree(reference[0].out, tmp_path / "run")
    longer, printed = _train(replace(config, train={"steps": STEPS + 2, "log_every": 1}), tmp_path / "run")
    assert "changed since the run began: train.steps: 12 -> 14" in printed
    assert longer.state.step == STEPS + 2
    assert _curve(longer)[:STEPS] == _curve(reference[0])


def test_other_settings_are_refused_with_the_difference(config, reference, tmp_path):
    out = reference[0].out
    for section, name, value, shown in (
        ("train", "seed", 1, "train.seed: 0 -> 1"),
        ("train", "steps", 10, "train.steps: 12 -> 10"),
        ("optim", "learning_rate", 0.5, "optim.learning_rate: 0.01 -> 0.5"),
    ):
        with pytest.raises(ConfigError, match="holds a run with other settings") as caught:
            train(replace(config, **{section: {name: value}}), out)
        assert shown in str(caught.value)
        assert "\n" not in str(caught.value)
    assert load_config(str(out / "config.toml")) == config


def test_a_checkpoint_truncated_by_hand_stops_the_run_with_one_line(config, reference, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(reference[0].out, out)
    newest = newest_checkpoint(out / "checkpoints")
    assert newest is not None
    largest = max((path for path in (newest / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="is damaged: state/"):
        _train(config, out)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert command.run([str(tmp_path / "config.toml"), "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"the newest good one is {out.resolve() / 'checkpoints' / '8'}; delete 12" in told
    shutil.rmtree(newest)
    _same_run(_train(config, out)[0], reference[0])


def test_a_full_disk_stops_the_run_with_one_line_and_the_run_goes_on_with_more_room(config, reference, tmp_path):
    out = tmp_path / "disk"
    out.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(out)]
    if subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root; test_checkpoint shows a full disk by a file size limit")
    try:
        with pytest.raises((CheckpointError, RunError)) as caught:
            _train(replace(config, train={"keep_checkpoints": 9}), out)
        told = str(caught.value)
        assert "No space left on device" in told
        assert "\n" not in told
        kept = [path.name for path in list_checkpoints(out / "checkpoints")]
        assert kept
        assert f"{out / 'checkpoints' / kept[-1]}" in told
        subprocess.run(["mount", "-o", "remount,size=8m", str(out)], check=True)
        run, printed = _train(config, out)
        assert f"going on from {out / 'checkpoints' / kept[-1]}" in printed
        _same_run(run, reference[0])
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_non_finite_steps_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(config, tmp_path):
    # Step 6 has so high a rate that the weights after it, and with them every gradient, leave the numbers.
    schedule = (Segment(4 * 64.0 + 1, 1.0), Segment(math.inf, 1e36))
    limits = {"checkpoint_every": 2, "max_nonfinite_steps": 3, "keep_checkpoints": 1, "eval_every": 100}
    wild = replace(config, optim={"schedule": schedule}, train=limits)
    console = Console(file=io.StringIO(), width=500)
    with pytest.raises(RunError) as caught:
        train(wild, tmp_path / "run", console=console)
    told = str(caught.value)
    good = tmp_path / "run" / "checkpoints" / "4"
    assert told.startswith("step 9: loss or gradient was not finite 3 steps in a row; the last good checkpoint is ")
    assert f"is {good}; delete 6 beside it, whose weights lead to this; go on in another --out with" in told
    assert "\n" not in told
    assert good.is_dir()
    printed = console.file.getvalue()
    assert "step 8: not saved" in printed
    assert "skipped 4" in printed


def test_weights_that_give_no_finite_loss_are_not_saved(config, tmp_path, monkeypatch):
    ruin = functools.partial(jax.tree.map, lambda leaf: leaf * np.nan)
    call = TrainStep.__call__

    def broken(self, state, rows):
        state, metrics = call(self, state, rows)
        return (dataclasses.replace(state, params=ruin(state.params)) if state.step == 6 else state), metrics

    monkeypatch.setattr(TrainStep, "__call__", broken)
    run, printed = _train(replace(config, train={"checkpoint_every": 3}), tmp_path / "run", stop_after=6)
    assert [path.name for path in list_checkpoints(run.out / "checkpoints")] == ["3"]
    assert "step 6: not saved, its loss or gradient is not finite" in printed
    assert "goes on from step 3" in printed


def test_a_new_run_can_start_from_the_weights_of_another(config, reference, tmp_path):
    source = str(reference[0].out)
    from_there = replace(config, train={"init_from": source}, data={"tokenizer": source})
    run, printed = _train(from_there, tmp_path / "run", stop_after=1)
    assert "weights from" in printed
    assert run.state.step == 1
    first, last = run.metrics[0]["loss"], reference[0].metrics[-1]["loss"]
    assert abs(first - last) < 0.3 * (reference[0].metrics[0]["loss"] - last)
    with pytest.raises(ConfigError, match="holds neither"):
        train(replace(config, train={"init_from": str(tmp_path)}), tmp_path / "other")


def test_weights_of_another_tokenizer_are_refused_before_one_is_made(config, reference, tmp_path):
    source = reference[0].out
    other = Tokenizer.load(source)
    given = tmp_path / "tokenizer.json"
    for tokenizer in ("train", str(given)):
        tree = json.loads(other.definition)
        words = tree["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        given.write_text(json.dumps(tree))
        with pytest.raises(ConfigError, match=r"^data\.tokenizer = .* is not the tokenizer of train\.init_from = "):
            train(replace(config, train={"init_from": str(source)}, data={"tokenizer": tokenizer}), tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_a_run_whose_last_weights_are_not_finite_is_no_success(config, tmp_path, monkeypatch):
    ruin = functools.partial(jax.tree.map, lambda leaf: leaf * np.nan)
    call = TrainStep.__call__

    def broken(self, state, rows):
        state, metrics = call(self, state, rows)
        return (dataclasses.replace(state, params=ruin(state.params)) if state.step == STEPS else state), metrics

    monkeypatch.setattr(TrainStep, "__call__", broken)
    with pytest.raises(RunError, match=rf"ended at step {STEPS} with a loss or gradient that is not finite"):
        train(config, tmp_path / "run", console=Console(file=io.StringIO()))


def test_the_run_gives_back_its_model(reference):
    run = reference[0]
    parts = split_model(run.model())
    jax.tree.map(np.testing.assert_array_equal, parts.params, run.state.params)
    jax.tree.map(np.testing.assert_array_equal, parts.router_bias, run.state.router_bias)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(parts.router_bias))


def test_checkpoints_carry_data_state_tokens_and_tokenizer(config, reference):
    path = reference[0].checkpoint
    info = read_info(path)
    assert (info.step, info.tokens, info.data["position"]) == (STEPS, STEPS * 64, STEPS * 4)
    assert info.val_bpb == reference[0].summary["val_bpb"]
    assert load_config(str(path / "config.toml")) == config
    assert (path / "tokenizer.json").read_bytes() == (reference[0].out / "tokenizer.json").read_bytes()


def test_out_is_asked_for(capsys):
    with pytest.raises(ConfigError, match="--out is missing"):
        command.run(["tiny"])
