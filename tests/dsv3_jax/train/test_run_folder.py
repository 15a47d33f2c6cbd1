"""A run folder belongs to one run and one process; what a person sees of a run."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from dsv3_jax.config import Config, ConfigError, TrainConfig, load_config, replace
from dsv3_jax.train import progress
from dsv3_jax.train.progress import RunProgress
from dsv3_jax.train.run_folder import StopRequest, open_run_folder

CONFIG = Config(train=TrainConfig(steps=100))
RECORD = {
    "step": 10, "tokens": 1000, "loss": 2.34567, "lr": 3e-4, "tokens_per_second": 12345.6, "max_vio": 0.5,
    "skipped": 0, "nonfinite": 0,
}  # fmt: skip


def _reopen(out, config):
    with open_run_folder(config, out) as changes:
        return changes


def _begun(out):
    """A run that got as far as its tokenizer."""
    _reopen(out, CONFIG)
    (out / "tokenizer.json").touch()


def test_a_command_that_failed_before_anything_was_made_binds_nobody(tmp_path):
    _reopen(tmp_path, replace(CONFIG, data={"source": "/nope"}))
    assert _reopen(tmp_path, CONFIG) == []
    assert load_config(str(tmp_path / "config.toml")) == CONFIG


def test_a_signal_before_the_first_step_stops_at_once_or_before_it_where_python_drops_the_interrupt():
    """As it does with what a handler raises inside a callback of the garbage collector."""
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with stop.deferred(), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_resolved_configuration_is_kept_and_given_back(tmp_path):
    assert _reopen(tmp_path / "a" / "run", CONFIG) == []
    assert load_config(str(tmp_path / "a" / "run" / "config.toml")) == replace(CONFIG)
    assert _reopen(tmp_path / "a" / "run", CONFIG) == []


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("train", "steps", 200), ("train", "steps", 0), ("train", "log_every", 3), ("train", "eval_every", 3),
        ("train", "checkpoint_every", 3), ("train", "keep_checkpoints", 5), ("data", "workers", 3),
        ("data", "prefetch", 3),
        ("mesh", "pipe", 2), ("mesh", "schedule", "zb1p"), ("mesh", "lag", 2), ("train", "unroll", True),
    ],
)  # fmt: skip
def test_length_intervals_loader_threads_and_the_mesh_may_change(tmp_path, section, name, value):
    _begun(tmp_path)
    changed = replace(CONFIG, **{section: {name: value}})
    before, after = (json.dumps(one) for one in (getattr(getattr(CONFIG, section), name), value))
    assert _reopen(tmp_path, changed) == [f"{section}.{name}: {before} -> {after}"]
    assert load_config(str(tmp_path / "config.toml")) == changed


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("train", "steps", 99), ("train", "seed", 1), ("train", "batch_size", 8), ("model", "hidden_size", 64),
        ("data", "seed", 5), ("optim", "warmup_steps", 1), ("train", "tokens", 1e6), ("train", "precision", "bf16"),
    ],
)  # fmt: skip
def test_all_else_is_refused_and_nothing_is_written(tmp_path, section, name, value):
    _begun(tmp_path)
    with pytest.raises(ConfigError, match=rf"holds a run with other settings \({section}\.{name}: .* -> "):
        _reopen(tmp_path, replace(CONFIG, **{section: {name: value}}))
    assert load_config(str(tmp_path / "config.toml")) == CONFIG


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path):
    hold = (
        "import fcntl, sys, time; lock = open(sys.argv[1] + '/.lock', 'a'); fcntl.flock(lock, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another process trains in it"):
            _reopen(tmp_path, CONFIG)
    finally:
        holder.kill()
        holder.communicate()
    assert _reopen(tmp_path, CONFIG) == []


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"--out = .* cannot be a run folder: File exists"):
        _reopen(tmp_path / "run", CONFIG)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop, stop.deferred():
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err.count("saving after this step") == 1


def _progress(monkeypatch=None, peak=None, terminal=False):
    if monkeypatch is not None:
        monkeypatch.setattr(progress, "peak_flops", lambda kind: peak)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    return RunProgress(console, CONFIG, 100, 0), console.file


def test_without_a_terminal_each_log_point_is_one_plain_line(monkeypatch):
    shown, file = _progress(monkeypatch, peak=1e12)
    with shown:
        shown.validation(10, 2.5)
        shown.update([RECORD | {"step": 9, "tokens": 900}, RECORD])
    (line,) = file.getvalue().splitlines()
    rate = 100 * 12345.6 * shown._flops / 1e12
    assert line == (
        f"step 10/100  loss 2.3457  lr 3.00e-04  12.3k tokens/s  MFU {rate:.1f}%  MaxVio 0.50  val 2.500 bpb  1 s left"
    )


def test_what_is_not_known_is_not_shown(monkeypatch):
    shown, _ = _progress(monkeypatch)
    line = shown.describe(RECORD | {"tokens_per_second": None, "max_vio": None, "loss": None})
    assert line == "loss not finite  lr 3.00e-04"


def test_skipped_steps_are_counted_and_shown():
    shown, file = _progress()
    shown.update([RECORD | {"skipped": 1}, RECORD | {"skipped": 1}])
    assert "skipped 2" in file.getvalue()


def test_a_terminal_gets_a_bar_and_a_line_that_renew_themselves():
    shown, file = _progress(terminal=True)
    with shown:
        shown.status("compiling the training step")
        shown._live.refresh()
        shown.update([RECORD])
        shown._live.refresh()
    printed = file.getvalue()
    assert printed.index("compiling the training step") < printed.index("loss 2.3457") < printed.rindex("\x1b[2K")
    assert "10/100" in printed


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 s"), (41.2, "42 s"), (185.0, "3:05"), (7384.0, "2:03:04"), (439200.0, "5 d 02 h")]
)
def test_durations_are_short(seconds, text):
    assert progress._duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(12.3, "12"), (1234.0, "1.23k"), (999_900.0, "1M"), (2.5e6, "2.5M")])
def test_rates_have_three_digits(value, text):
    assert progress._short(value) == text
