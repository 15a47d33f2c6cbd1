"""Two real processes train, are stopped, killed, and go on as one, through the command line."""

import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from dsv3_jax.checkpoint import list_checkpoints, restore
from dsv3_jax.config import load_config, replace, to_toml
from dsv3_jax.train.ema import abstract_average
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.trainer import train
from pallas_kernels.testing import assert_close

ROOT = Path(__file__).resolve().parents[3]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
PATIENCE = 300.0
"""Seconds that anything here may take on a busy machine."""


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """The same programs here and in the subprocesses, compiled quickly."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield settings["jax_compilation_cache_dir"]
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run without end on a mesh of two devices."""
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
                "attention": "mha", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
                "n_routed_experts": 4, "n_shared_experts": 0, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                "init_std": 0.05, "num_nextn_predict_layers": 0,
            },
            "data": {"source": str(folder), "workers": 0, "shards": 2},
            "train": {
                "steps": 100000, "seq_len": 16, "batch_size": 4, "eval_sequences": 0, "checkpoint_every": 4,
                "keep_checkpoints": 100000, "log_every": 1, "ema_decay": 0.9,
            },
            "optim": {"warmup_steps": 2, "learning_rate": 1e-3},
            "mesh": {"data": 2},
        }
    )  # fmt: skip


FORKS = """
import json, os, sys, threading
import dsv3_jax.train.trainer
from dsv3_jax.cli.main import main

def wait(pid, path):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(path + ".tmp", "w") as stream:
        stream.write(str(status))
    os.rename(path + ".tmp", path)

for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if not pid:
        os.environ.update(order["environment"])
        for number, path in enumerate([os.devnull, order["path"] + ".out", order["path"] + ".err"]):
            os.dup2(os.open(path, os.O_CREAT | (os.O_WRONLY if number else os.O_RDONLY)), number)
        sys.exit(main(order["argv"]))
    threading.Thread(target=wait, args=(pid, order["path"] + ".status")).start()
    print(pid, flush=True)
"""


@pytest.fixture(scope="module")
def forks(compile_cache):
    """A process that has imported everything and starts nothing, from which the processes of the tests are forked."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": compile_cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS], env=environment, **pipes) as process:
        yield process


class Pair:
    """Two processes of one job, each with one device, that run ``dsv3 train``."""

    def __init__(self, config, out, forks):
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
        preset = out.with_suffix(".toml")
        preset.write_text(to_toml(config))
        environment = {"DSV3_COORDINATOR": f"localhost:{port}", "DSV3_PROCESSES": "2"}
        self.out, self.pids, self.paths = out, [], [f"{out}.{i}" for i in range(2)]
        for i, path in enumerate(self.paths):
            argv = ["train", str(preset), "--out", str(out), "--launch.process", str(i)]
            forks.stdin.write(json.dumps({"argv": argv, "environment": environment, "path": path}) + "\n")
            forks.stdin.flush()
            self.pids.append(int(forks.stdout.readline()))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for pid, path in zip(self.pids, self.paths, strict=True):
            if not Path(path + ".status").exists():
                os.kill(pid, signal.SIGKILL)

    def reach(self, step):
        """Wait until the metrics of a step are written."""
        deadline = time.monotonic() + PATIENCE
        while not any(record["step"] >= step for record in read_metrics(self.out)):
            ended = [Path(path + ".err").read_text() for path in self.paths if Path(path + ".status").exists()]
            assert not ended, ended
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ends(self):
        """Status, output and errors of each."""
        deadline = time.monotonic() + PATIENCE
        while not all(Path(path + ".status").exists() for path in self.paths):
            assert time.monotonic() < deadline, [Path(path + ".err").read_text() for path in self.paths]
            time.sleep(0.02)
        texts = [[Path(path + end).read_text() for end in (".status", ".out", ".err")] for path in self.paths]
        return [(int(status), printed, errors) for status, printed, errors in texts]


def own_lines(errors):
    """What we say; the libraries below talk too."""
    return [line for line in errors.splitlines() if line.startswith("dsv3: ")]


@pytest.fixture(scope="module")
def begun(config, tmp_path_factory):
    """The first three steps by one process on one device."""
    out = tmp_path_factory.mktemp("begun") / "run"
    train(replace(config, mesh={"data": 1}), out, stop_after=3, console=Console(quiet=True))
    return out


@pytest.fixture(scope="module")
def reference(begun, tmp_path_factory):
    """The folder of a run by one process on two devices."""
    out = tmp_path_factory.mktemp("reference") / "run"
    shutil.copytree(begun, out)
    return out


@pytest.fixture(scope="module")
def losses(config, reference):
    """``(steps) -> losses`` of that run."""
    out = reference

    def upto(steps):
        if len(read_metrics(out)) < steps:
            train(config, out, stop_after=steps, console=Console(quiet=True))
        return [record["loss"] for record in read_metrics(out)[:steps]]

    return upto


def test_two_processes_go_on_from_one_and_one_from_two_that_sigterm_to_one_has_stopped_at_one_step(
    config, begun, tmp_path, forks, reference, losses
):
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    with Pair(config, out, forks) as pair:
        pair.reach(6)
        os.kill(pair.pids[1], signal.SIGTERM)
        sent = time.monotonic()
        (status_0, printed_0, errors_0), (status_1, printed_1, errors_1) = pair.ends()
        took = time.monotonic() - sent
    assert (status_0, status_1) == (130, 130), errors_0 + errors_1
    assert f"going on from {out / 'checkpoints' / '3'}" in printed_0.replace("\n", "")
    step = int(list_checkpoints(out / "checkpoints")[-1].name)
    assert f"stopped after step {step} of 100000 (process 1 of 2 (" in printed_0
    assert "was asked to, and all was saved" in printed_0
    assert "SIGTERM: saving after this step" in errors_1
    assert [line for line in printed_1.splitlines() if not line.startswith("[Gloo]")] == []
    assert own_lines(errors_0) == own_lines(errors_1) == []
    assert took < 120
    assert [record["step"] for record in read_metrics(out)] == list(range(1, step + 1))
    train(config, out, stop_after=step + 4, console=Console(quiet=True))
    found = [record["loss"] for record in read_metrics(out)]
    assert len(found) == step + 4
    np.testing.assert_allclose(found, losses(step + 4), rtol=1e-6)
    # The moving average went through both hands: the latest that both runs have saved.
    paths = [folder / "checkpoints" / str((step + 4) // 4 * 4) for folder in (out, reference)]
    wanted = {"ema": abstract_average(config)}
    averages = [jax.tree.map(np.array, restore(path, wanted, partial=True)) for path in paths]
    jax.tree.map(functools.partial(assert_close, tolerance=1e-4), *averages)


def test_the_death_of_process_0_ends_the_other_with_one_line(config, begun, tmp_path, forks, losses):
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    with Pair(config, out, forks) as pair:
        pair.reach(8)
        os.kill(pair.pids[0], signal.SIGKILL)
        killed = time.monotonic()
        (status_0, _, _), (status_1, _, errors_1) = pair.ends()
        took = time.monotonic() - killed
    assert status_0 == -signal.SIGKILL
    assert status_1 == 1, errors_1
    assert took < 10
    newest = list_checkpoints(out / "checkpoints")[-1]
    assert len(own_lines(errors_1)) == 1, errors_1
    (line,) = own_lines(errors_1)
    assert line.startswith(f"dsv3: error: process 0 of 2 ({socket.gethostname()}) is gone: its connection closed; ")
    assert line.endswith(f"the newest complete checkpoint is {newest}; the same command goes on from it")
    assert "Traceback" not in errors_1
    assert "Check failure" not in errors_1
    found = [record["loss"] for record in read_metrics(out)]
    np.testing.assert_allclose(found, losses(len(found)), rtol=1e-6)
