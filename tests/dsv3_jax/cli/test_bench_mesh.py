"""``dsv3 bench mesh``: rows in processes of their own, those that fail, and the whole on a micro model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.cli import bench_mesh, bench_mesh_row
from dsv3_jax.cli.main import main
from dsv3_jax.config import to_toml
from dsv3_jax.train.mesh_rows import EVERY
from tests.dsv3_jax import micro

MACHINE = {"kind": "NVIDIA H200", "count": 4, "memory": 0, "jax": "0.11.2"}
ROUTED = micro.V3 | {"num_hidden_layers": 3, "attention": "mha", "num_key_value_heads": 1, "head_dim": 8}


def facts(trials, **more):
    def one(sequences):
        ms = {"step_ms": 10.0 * sequences, "step_ms_min": 1.0, "step_ms_max": 2.0, "tokens_per_second": 400.0}
        return {"sequences": sequences, "losses": [4.0, 4.1, 4.2], "grad_norms": [1.0] * 3} | ms

    made = {"compile_seconds": 1.0, "trials": [one(each) for each in trials], "peak_memory_gib": [1.0]}
    return made | more


class Children:
    """Processes of rows that do at once what they are told by name: ``facts``, an exit status, or what to raise."""

    def __init__(self, **told):
        self.told, self.begun, self.compiled, self.killed, self.environments = told, [], [], [], {}

    def __call__(self, command, env, stdout):
        spec = json.loads(Path(command[-2]).read_text(encoding="utf-8"))
        name = spec["name"]
        if spec["amount"] is not None:
            self.begun.append(name)
        self.environments[name] = env
        told = self.told.get(name, {})
        if spec["amount"] is None:
            self.compiled.append((name, env["CUDA_VISIBLE_DEVICES"]))
        elif not isinstance(told, int):
            found = facts(spec["trials"]) | (told if isinstance(told, dict) else {})
            Path(command[-1]).write_text(json.dumps(found), encoding="utf-8")
        return Child(self, name, told)


class Child:
    def __init__(self, children, name, told):
        self.children, self.name, self.told, self.over = children, name, told, False

    def wait(self, seconds=None):
        if seconds is not None and isinstance(self.told, BaseException):
            raise self.told
        self.over = True
        return self.told if isinstance(self.told, int) else 0

    def poll(self):
        return 0 if self.over or self.children.begun == [] else None

    def kill(self):
        self.children.killed.append(self.name)


@pytest.fixture
def children(monkeypatch):
    def made(**told):
        found = Children(**told)
        monkeypatch.setattr(bench_mesh, "look", lambda environment: dict(MACHINE))
        monkeypatch.setattr(bench_mesh.subprocess, "Popen", found)
        return found

    return made


def bench(*words):
    return main(["bench", "mesh", "bench_3b", *words])


def test_every_row_is_in_the_table_and_the_file(children, tmp_path, capsys):
    found, out = children(), tmp_path / "mesh.json"
    assert bench("--json", str(out)) == 0
    assert found.begun[:3] == ["one", "expert", "data"], "the most important first"
    assert len(found.begun) == 10
    told = json.loads(out.read_text())
    assert [line["name"] for line in told["figures"]][:4] == ["one", "one", "expert", "data"]
    assert told["figures"][2]["loss_error"] == 0
    printed = capsys.readouterr().out
    for word in ("bench_3b on 4 x NVIDIA H200, bf16", "pipe = 2, expert = 2, dualpipe", "0.0e+00", "16 x 4", "64 x 4"):
        assert word in printed


def test_flags_of_several_gpus_are_those_of_training(children, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    found = children()
    assert bench("--only", "expert") == 0
    assert found.environments["expert"]["NCCL_NVLS_ENABLE"] == "0"
    assert "latency_hiding_scheduler=true" in found.environments["expert"]["XLA_FLAGS"]
    assert "NCCL_NVLS_ENABLE" not in found.environments["one"]
    assert "NCCL_NVLS_ENABLE" not in os.environ
    assert found.environments["one"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == bench_mesh.SHARE


def test_a_row_that_differs_or_fails_is_a_line_and_the_status_is_1(children, tmp_path, capsys):
    wrong = {"trials": [facts([16])["trials"][0] | {"losses": [4.0, 4.2, 4.2]}]}
    out = tmp_path / "mesh.json"
    children(expert=wrong, data=-11, **{"1f1b": {"trials": [], "failed": "the device has too little memory"}})
    assert bench("--only", "expert,data,1f1b,dualpipe", "--json", str(out)) == 1
    printed = capsys.readouterr().out
    for word in ("DIFFER 2.4e-02", "data: its process ended with status -11", "1f1b: the device has too little memory"):
        assert word in printed
    figures = {line["name"]: line for line in json.loads(out.read_text())["figures"]}
    assert figures["expert"]["differs"]
    assert figures["dualpipe"]["failed"] is None, "those after it have run"


def test_what_is_left_when_time_is_over_is_told_and_no_failure(children, capsys):
    found = children()
    assert bench("--only", "expert", "--seconds", "1") == 0
    assert found.begun == []
    assert "expert: left out: the time is over" in capsys.readouterr().out


def test_a_row_that_takes_too_long_is_ended_and_what_it_has_is_kept(children, tmp_path):
    out = tmp_path / "mesh.json"
    found = children(expert=subprocess.TimeoutExpired("row", 1))
    assert bench("--only", "expert,data", "--each", "99", "--json", str(out)) == 1
    assert found.killed == ["expert"]
    assert found.begun == ["one", "expert", "data"]
    line = next(line for line in json.loads(out.read_text())["figures"] if line["name"] == "expert")
    assert (line["failed"], line["step_ms"]) == ("ended after 99 s", 160.0)


def test_ctrl_c_keeps_what_was_done_and_resuming_goes_on(children, tmp_path, capsys):
    out = tmp_path / "mesh.json"
    found = children(data=KeyboardInterrupt())
    assert bench("--only", "expert,data", "--json", str(out)) == 130
    assert found.begun == ["one", "expert", "data"]
    assert found.killed == ["data"]
    assert "expert" in capsys.readouterr().out, "the table is shown"
    again = children()
    assert bench("--only", "expert,data", "--json", str(out), "--resume") == 0
    assert again.begun == ["data"]
    assert {line["name"] for line in json.loads(out.read_text())["figures"]} == {"one", "expert", "data"}
    assert bench("--only", "zb1p,expert,data", "--json", str(out), "--resume") == 0
    assert bench("--only", "zb1p", "--json", str(out), "--resume") == 0
    assert again.begun == ["data", "one", "zb1p", "one"], "the reference, on other batches than before"
    assert {"expert", "data", "zb1p"} <= {line["name"] for line in json.loads(out.read_text())["figures"]}
    assert bench("--only", "expert", "--json", str(out), "--resume", "--steps", "9") == 2
    assert "is of other settings (steps); name another --json" in capsys.readouterr().err


def test_programs_compiled_ahead_choose_their_kernels_on_different_gpus(children, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("DSV3_COMPILE_CACHE", "")
    found = children()
    assert bench("--only", "expert,data", "--ahead") == 0
    assert found.begun == ["one", "expert", "data"]
    assert found.compiled == [("one", "4,5,6,7"), ("expert", "5,6,7,4"), ("data", "6,7,4,5")]
    assert found.environments["expert"]["CUDA_VISIBLE_DEVICES"] == "4,5,6,7", "rows see them as they are"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--ahead"], "--ahead needs a folder for compiled programs: the cache is off"),
        (["--gpus", "8"], "--gpus = 8: this machine has 4 (NVIDIA H200)"),
        (["--gpus", "1"], "a mesh needs 2 devices or more, not 1"),
        (["--gpus", "3", "--only", "dualpipe"], "--only names 'dualpipe': dualpipe needs an even number of devices"),
        (["--only", "expertt"], "--only names 'expertt'; the rows are one, expert, data"),
        (["--steps", "0"], "--steps = 0 must be at least 1"),
        (["--seconds", "0"], "--seconds = 0 must be above 0"),
        (["--resume"], "--resume needs --json"),
        (["--json", "nowhere/mesh.json"], "--json = 'nowhere/mesh.json' is in a folder that does not exist"),
        (["--mesh.data", "2", "--train.batch-size", "8"], "leave them out"),
    ],
)
def test_a_mistake_is_one_line(children, capsys, given, told):
    found = children()
    assert bench(*given) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert found.begun == []


def test_a_row_travels_whole_to_its_process():
    from dsv3_jax.config import load_config
    from dsv3_jax.train.mesh_bench import Amount
    from dsv3_jax.train.mesh_rows import make_rows

    for row in make_rows(load_config("bench_3b"), 4).run:
        spec = bench_mesh_row.spec_of(row, Amount(4, 2, 1), "off")
        assert bench_mesh_row.row_of(json.loads(json.dumps(spec))) == row


def preset(folder, model, **train):
    config = micro.config(
        model | {"num_nextn_predict_layers": 0, "vocab_size": 64},
        train={"seq_len": 16, "batch_size": 1, "micro_batch_size": 1} | train,
        loss={"mtp_weight": 0},
    )
    path = folder / "micro.toml"
    path.write_text(to_toml(config))
    return str(path)


class Here:
    """A row's process that is this one."""

    def __init__(self, command, env, stdout):
        self.status = bench_mesh_row.main(command[-2:])

    def wait(self, seconds=None):
        return self.status

    def poll(self):
        return self.status


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_whole_of_it_on_two_devices(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_mesh.subprocess, "Popen", Here)
    monkeypatch.setattr(bench_mesh, "look", lambda environment: MACHINE | {"kind": "cpu", "count": 8})
    out = tmp_path / "mesh.json"
    command = ["bench", "mesh", preset(tmp_path, micro.DENSE_GQA), "--gpus", "2", "--only", "data"]
    assert main([*command, "--steps", "2", "--warmup", "1", "--profiled", "1", "--json", str(out)]) == 0
    one, data = json.loads(out.read_text())["figures"]
    assert (one["sequences"], data["sequences"]) == (2, 2)
    assert 0 <= data["loss_error"] < 1e-5
    assert data["of_one"] == pytest.approx(data["tokens_per_second"] / 2 / one["tokens_per_second"])
    assert data["communication_ms"] > 0
    assert data["exposed_ms"] is None, "of a GPU only"
    assert data["peak_memory_gib"] > 0
    assert "data = 2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_program_compiled_ahead_is_found_by_its_row(tmp_path):
    """Its name in the cache is made of the lines that led to it, too."""
    out, cache = tmp_path / "mesh.json", tmp_path / "cache"
    command = [sys.executable, "-m", "dsv3_jax.cli.main", "bench", "mesh", preset(tmp_path, ROUTED)]
    command += [
        "--gpus",
        "2",
        "--only",
        "1f1b",
        "--steps",
        "1",
        "--warmup",
        "1",
        "--ahead",
        "--each",
        "900",
        "--seconds",
        "1800",
    ]
    command += ["--compile-cache", str(cache), "--json", str(out), "--profiled", "0"]
    subprocess.run(command, env=os.environ | {"DSV3_COMPILE_CACHE": ""}, check=True)
    programs = [path for path in cache.iterdir() if path.name.startswith("jit__local_step")]
    assert len(programs) == 2, "one of each row"


@pytest.mark.slow
def test_every_row_runs_and_equals_one_device(tmp_path):
    out = tmp_path / "mesh.json"
    command = [
        sys.executable,
        "-m",
        "dsv3_jax.cli.main",
        "bench",
        "mesh",
        preset(tmp_path, ROUTED | {"num_hidden_layers": 5}),
    ]
    command += [
        "--gpus",
        "4",
        "--only",
        ",".join((*EVERY, "passes", "pairs")),
        "--steps",
        "2",
        "--seconds",
        "3000",
        "--each",
        "900",
        "--tolerance",
        "2e-5",
        "--json",
        str(out),
    ]
    done = subprocess.run(command, env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}, check=False)
    told = json.loads(out.read_text())
    assert done.returncode == 0, [line["failed"] for line in told["figures"]]
    found = {line["name"]: line for line in told["figures"]}
    assert len(found) == 12
    for name in ("1f1b", "zb1p", "dualpipe", "dualpipev", "pipe_expert"):
        assert found[name]["loss_error"] < 2e-5
        # DualPipe between two ranks has both stages on each: nobody waits.
        assert (found[name]["ideal_bubble"] == 0) == (name == "pipe_expert")
        assert found[name]["ideal_bubble"] <= found[name]["predicted_bubble"] + 1e-9
        assert found[name]["bubble"] is not None
