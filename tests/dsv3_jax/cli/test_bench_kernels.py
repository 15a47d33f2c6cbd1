"""``dsv3 bench kernels``: its table, its refusals, and what becomes of a room that fails; its neighbours' refusals."""

import json
import subprocess
from pathlib import Path

import pytest

import pallas_kernels
from dsv3_jax.cli import bench, bench_kernels
from dsv3_jax.cli.main import main
from dsv3_jax.config import ConfigError


def test_without_hopper_it_is_one_line():
    with pytest.raises(ConfigError, match="needs an NVIDIA Hopper GPU: the default backend is 'cpu'"):
        bench.run(["kernels"])


def test_an_unknown_room_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"--only names 'gem'; the rooms are quantize, .*permute"):
        bench.run(["kernels", "--only", "gem"])


def test_rooms_rows_are_gathered_and_one_that_fails_is_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_kernels, "_obstacle", lambda: None)
    rows = [
        {"case": "gemm/1/2/3", "tiling": "fp8_n128", "us": 5.0, "tflops": 700.0, "gbs": 90.0, "sustained_us": 6.0}
        | {"sustained_tflops": 600.0, "calc_diff": 1e-6, "sustained_to_xla": 1.5}
    ]

    def bench_of(command, **how):
        assert how["timeout"] == 90.0
        if "pallas_kernels.permute.bench" in command:
            raise subprocess.TimeoutExpired(command, 90)
        with open(command[command.index("--json") + 1], "w", encoding="utf-8") as file:
            json.dump(rows, file)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench_kernels.subprocess, "run", bench_of)
    out = tmp_path / "all.json"
    assert bench.run(["kernels", "--only", "fp8_gemm,permute", "--json", str(out)]) == 1
    printed = capsys.readouterr().out
    for word in ("gemm/1/2/3", "5.0", "700", "6.0", "600", "1.0e-06", "1.50", "stopped after 90 s"):
        assert word in printed
    assert [row["room"] for row in json.loads(out.read_text())] == ["fp8_gemm", "permute"]


def test_every_room_with_a_bench_is_one():
    folder = Path(pallas_kernels.__file__).parent
    assert {bench.parent.name for bench in folder.glob("*/bench.py")} == set(bench_kernels.ROOMS)
    text = Path(bench_kernels.__file__).read_text(encoding="utf-8")
    assert ", ".join(bench_kernels.ROOMS) in " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--foo"], "unknown option --foo; did you mean '--only'?; see `dsv3 bench kernels --help`"),
        (["--seconds", "abc"], "--seconds = 'abc' must be a number"),
        (["--seconds", "0"], "--seconds = 0 must be a finite number above 0"),
        (["--seconds", "nan"], "--seconds = nan must be a finite number above 0"),
        (["gemm"], "'gemm' is not expected; see `dsv3 bench kernels --help`"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, told):
    assert main(["bench", "kernels", *words]) == 2
    assert capsys.readouterr().err == f"dsv3: error: {told}\n"


@pytest.mark.parametrize("command", [["train", "tiny"], ["decode", "tiny"], ["kernels"]])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(command, capsys, tmp_path, monkeypatch):
    def measured(*arguments, **settings):
        raise AssertionError("measured")

    monkeypatch.setattr("dsv3_jax.train.bench.bench_step", measured)
    monkeypatch.setattr("dsv3_jax.inference.bench.random_model", measured)
    monkeypatch.setattr(bench_kernels, "_obstacle", measured)
    for name, told in (
        (str(tmp_path / "nope" / "x.json"), "is in a folder that does not exist"),
        (str(tmp_path), "is a folder: name a file in it"),
    ):
        assert main(["bench", *command, "--json", name]) == 2
        assert capsys.readouterr().err == f"dsv3: error: --json = {name!r} {told}\n"
    monkeypatch.setattr("os.access", lambda *arguments: False)
    name = str(tmp_path / "x.json")
    assert main(["bench", *command, "--json", name]) == 2
    assert capsys.readouterr().err == f"dsv3: error: --json = {name!r} may not be written: name another file\n"
    assert not list(tmp_path.iterdir())


def test_names_in_tables_are_no_markup(capsys):
    bench._print_table({"preset": "[/b]", "devices": 1, "device": "[b]:smile:", "precision": "[/i]"})
    bench_kernels._print_table([{"room": "permute", "case": "[/b]", "failed": "[/i]"}])
    printed = capsys.readouterr().out
    for told in ("[/b] on 1 x [b]:smile:", "[/i] │", "[/b] │", "failed: [/i]"):
        assert told in " ".join(printed.split())
