"""``dsv3 plan pipeline``: a table and a picture for people, an object for programs."""

import json

import pytest

from dsv3_jax.cli.main import main

PIPE = ["plan", "pipeline", "deepseek_v3", "--mesh.pipe", "2", "--mesh.waiting=-1", "--micro-batches", "4"]


def test_tables_and_a_picture(capsys, tmp_path):
    picture = tmp_path / "new" / "a.png"
    assert main([*PIPE, "--time.forward", "1", "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "deepseek_v3: 2 ranks, 4 micro-batches of 4,096 tokens" in out
    assert all(name in out for name in ("GPipe", "1F1B", "ZB1P", "DualPipe", "DualPipeV"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert out.splitlines()[-1] == f"Drawn: {picture}"


def test_the_object(capsys):
    assert main([*PIPE, "--time.forward", "1", "--out=", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["picture"] is None
    assert (facts["ranks"], facts["micro_batches"], facts["refused"]) == (2, 4, {})
    found = facts["schedules"]
    assert found["1f1b"]["time"] == 15
    assert found["1f1b"]["idle"] == [3, 3]
    assert found["1f1b"]["idle_by_formula"] == 3
    assert found["dualpipe"]["bubble"] == 0
    assert found["dualpipe"]["weights"] > found["1f1b"]["weights"]
    assert all(0 < one["activations"] < one["memory"] for one in found.values())
    assert found["zb1p"]["passes_held"] == [2, 2]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_weights_are_those_of_the_products_and_activations_are_told_at_any_number_of_micro_batches(capsys, precision):
    """Two bytes a number in either precision: bfloat16, or a code in each orientation."""
    words = [*PIPE[:-1], "200", "--time.forward", "1", "--out=", "--json", "--train.precision", precision]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["schedules"]
    half = 671e9 / 2
    for name, one in found.items():
        assert one["weights"] == pytest.approx(2 * half * (2 if name == "dualpipe" else 1), rel=0.1)
        assert one["activations"] > 0


def test_a_bound_of_waiting_weight_gradients_is_told(capsys):
    assert main([*PIPE, "--mesh.waiting", "1", "--time.forward", "1", "--out="]) == 0
    assert "at most 1 passes of a rank wait at one time (mesh.waiting)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tiny"], "mesh.pipe = 1 is no pipeline"),
        (
            ["tiny", "--mesh.pipe", "2", "--mesh.schedule", "dualpipe", "--micro-batches", "2"],
            "mesh.schedule: dualpipe on 2 ranks needs 4 micro",
        ),
        (["tiny", "--mesh.pipe", "2", "--mesh.schedule", "zb2"], "zb2"),
        (["tiny", "--mesh.pipe", "2", "--time.pair", "0"], "--time.pair = 0 must be above 0"),
        (["tiny", "--mesh.pipe", "2", "--time.send", "-1"], "--time.send = -1 must not be negative"),
        (["tiny", "--mesh.pipe", "2", "--time.pair", "nan"], "--time.pair = nan must be a finite number"),
        (["tiny", "--mesh.pipe", "2", "--time.forward", "inf"], "--time.forward = inf must be a finite number"),
        (["tiny", "--mesh.pipe", "2", "--mesh.lag", "3"], "mesh.lag = 3 must be 1"),
        (["tiny", "--mesh.pipe", "2", "--micro-batches", "-1"], "--micro-batches = -1 must not be negative"),
        (["tiny", "--mesh.pipe", "2", "--out", "a.pdf"], "--out = 'a.pdf' must end in .png"),
        (["tiny", "--mesh.pipe", "9"], "mesh.pipe = 9 must be at most the 3"),
    ],
)
def test_mistakes_are_one_line(capsys, words, line):
    assert main(["plan", "pipeline", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("dsv3: error: ")
    assert line in told
    assert told.count("\n") == 1


def test_a_name_and_a_picture_s_path_are_no_markup(capsys, tmp_path):
    picture = tmp_path / "[b]:smile:.png"
    assert main([*PIPE, "--time.forward", "1", "--name", "[/b]", "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "[/b]: 2 ranks, 4 micro-batches" in out
    assert out.splitlines()[-1] == f"Drawn: {picture}"
