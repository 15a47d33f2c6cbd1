"""``dsv3 bench transports``: its table, and mistakes as one line."""

import json

import pytest

from dsv3_jax.cli.main import main

SMALL = ["--tokens", "24", "--hidden", "256", "--experts", "8", "--choices", "2", "--each", "0.001"]


def test_a_table_and_a_file_of_what_was_measured(tmp_path, capsys):
    out = tmp_path / "transports.json"
    command = ["bench", "transports", "--gpus", "2", "--only", "counted, two_hop", "--json", str(out), *SMALL]
    assert main(command) == 0
    (row,) = json.loads(out.read_text())
    assert (row["transport"], row["ranks"], row["fp8"]) == ("counted", 2, True)
    printed = capsys.readouterr().out
    for word in ("2 x cpu: 24 tokens x 256, 2 of 8 experts, FP8 there", "counted", "two_hop needs 4 devices or more"):
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
