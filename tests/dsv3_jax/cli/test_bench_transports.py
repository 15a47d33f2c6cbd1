"""``dsv3 bench transports``: its table, and mistakes as one line."""

import json

import pytest

from dsv3_jax.cli.main import main

ROW = {"ranks": 2, "round_trip_us": 2345.6, "exchange_there_us": 700.4, "exchange_back_us": 1300.0} | {
    f"{name}_{key}": value
    for name in ("dispatch", "combine")
    for key, value in {"us": 900.1, "gbs": 120.25, "of_deepep": 0.79, "wire_gbs": 200.5, "of_nvlink": 0.45}.items()
}


def test_a_table_and_a_file_of_what_was_measured(tmp_path, capsys, monkeypatch):
    asked = []

    def measured(transport, shapes, mesh, **how):
        asked.append((transport, shapes.tokens, mesh.shape["expert"], how["capacity"], how["seconds"]))
        return {"transport": transport, **ROW}

    monkeypatch.setattr("sharding.expert_parallel.bench.measure", measured)
    out = tmp_path / "transports.json"
    command = [
        "bench",
        "transports",
        "--gpus",
        "2",
        "--only",
        "counted, two_hop",
        "--capacity",
        "1.5",
        "--json",
        str(out),
    ]
    assert main(command) == 0
    assert asked == [("counted", 4096, 2, 1.5, 0.3)]
    assert json.loads(out.read_text()) == [{"transport": "counted", **ROW}]
    printed = capsys.readouterr().out
    for word in ("2 x cpu: 4096 tokens x 7168, 8 of 256 experts, FP8", "two_hop needs 4 devices or more", "2,345.6"):
        assert word in printed
    for word in ("900.1", "120.2", "0.79", "200.5", "45%", "700 + 1,300"):
        assert word in printed


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--gpus", "16"], "--gpus = 16: this machine has 8 (cpu)"),
        (["--gpus", "1"], "--gpus = 1: experts on one device are sent nowhere, give 2 or more"),
        (["--gpus", "3"], "--experts = 256 must be a multiple of the 3 devices"),
        (["--only", "pigeon"], "--only names 'pigeon'; the transports are padded, counted, ring, two_hop"),
        (["--gpus", "2", "--only", "two_hop"], "two_hop needs 4 devices or more, not 2"),
        (["--tokens", "0"], "--tokens = 0 must be above 0"),
        (["--choices", "9", "--experts", "8"], "--choices = 9 must be at most --experts = 8"),
    ],
)
def test_a_mistake_is_one_line(capsys, given, told):
    assert main(["bench", "transports", *given]) == 2
    assert capsys.readouterr().err == f"dsv3: error: {told}\n"
