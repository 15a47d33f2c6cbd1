"""``dsv3 plan memory``: a table for people, an object for programs, a line for what does not fit."""

import json

import pytest

from dsv3_jax.cli.main import main


def test_the_object_s_parts_add_up(capsys):
    assert main(["plan", "memory", "tiny", "--mesh.expert", "4", "--mesh.data", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["mesh"] == {"pipe": 1, "expert": 4, "data": 2}
    assert sum(facts["state"].values()) == facts["arguments"]
    assert sum(facts["step"].values()) == facts["temporaries"]
    assert facts["arguments"] + facts["temporaries"] == facts["total"]
    assert facts["device"] is facts["fits"] is facts["remedy"] is None


def test_a_cluster_brings_its_mesh_and_its_memory(capsys):
    assert main(["plan", "memory", "deepseek_v3", "--mesh.cluster", "h800_2048", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["mesh"] == {"pipe": 16, "expert": 64, "data": 2}
    assert facts["device"] == 80_000_000_000
    assert facts["schedule"] == "dualpipe"


def test_the_table_ends_with_whether_it_fits(capsys):
    assert main(["plan", "memory", "bench_3b", "--device-gb", "141"]) == 0
    table = capsys.readouterr().out
    assert "masters" in table
    assert "total" in table
    assert table.splitlines()[-1] == "fits: 59.7 GB on a device of 141.0 GB"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["plan"], "name what to plan"),
        (["plan", "lunch", "tiny"], "dsv3 plan 'lunch' is not known; there is memory, pipeline, compile"),
        (["plan", "memory", "tiny", "--mesh.pipe", "9"], "mesh.pipe = 9 must be at most the 3"),
        (["plan", "memory", "tiny", "--device-share", "1.5"], "--device-share = 1.5 must be above 0 and at most 1"),
        (["plan", "memory", "tiny", "--device-gb", "-1"], "--device-gb = -1 must not be negative"),
        (["plan", "memory", "tiny", "--device-gb", "nan"], "--device-gb = nan must be a number of GB, such as 80; 0 "),
        (["plan", "memory", "tiny", "--device-gb", "inf"], "--device-gb = inf must be a number of GB"),
        (["plan", "memory", "tiny", "--device-gb", "1e300"], "--device-gb = 1e+300 must be a number of GB"),
        (["plan", "memory", "tiny", "--device-share", "nan"], "--device-share = nan must be above 0 and at most 1"),
        (["train", "tiny", "--mesh.lag", "3", "--out", "x"], "mesh.lag = 3 must be 1"),
        (["train", "tiny", "--mesh.waiting", "-2", "--out", "x"], "mesh.waiting = -2 must be -1"),
        (["train", "tiny", "--mesh.pipe", "2", "--mesh.lag", "3", "--out", "x"], "mesh.lag = 3 must be 1"),
    ],
)
def test_mistakes_are_one_line(capsys, words, line):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("dsv3: error: ")
    assert line in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["[/b]", "[b]x", ":smile:"])
def test_a_name_is_no_markup(capsys, name):
    assert main(["plan", "memory", "tiny", "--name", name]) == 0
    assert f"{name} on pipe 1 " in capsys.readouterr().out
