"""``dsv3 info``: the keys that programs rely on, and a table for people."""

import json

import pytest

from dsv3_jax.cli.main import main


def facts(capsys, *argv):
    assert main(["info", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_v3_has_the_exact_numbers_under_the_fixed_keys(capsys):
    found = facts(capsys, "deepseek_v3")
    components = found.pop("components")
    assert sum(components.values()) == found["parameters_total"]
    assert found == {
        "name": "deepseek_v3",
        "parameters_total": 671_026_419_200,
        "parameters_active": 37_552_297_472,
        "parameters_active_no_embedding": 36_625_618_432,
        "parameters_trainable": 671_026_419_200 + 11_610_068_224 - 59 * 256,
        "parameters_mtp": 11_610_068_224,
        "seq_len": 4096,
        "flops_per_token": pytest.approx(250.46e9, rel=2e-5),
        "cache_bytes_per_token": 70_272,
    }


def test_seq_len_changes_the_attention_part_alone(capsys):
    at_4k, at_8k = facts(capsys, "deepseek_v3"), facts(capsys, "deepseek_v3", "--seq-len", "8192")
    assert at_8k["flops_per_token"] - at_4k["flops_per_token"] == 3 * 61 * 2 * 128 * 320 * 2048
    assert at_8k["parameters_total"] == at_4k["parameters_total"]


def test_fields_of_the_model_can_be_changed(capsys):
    more = facts(capsys, "tiny", "--model.n-routed-experts", "32")
    assert more["components"]["routed_experts"] == 2 * facts(capsys, "tiny")["components"]["routed_experts"]


def test_the_table_shows_the_same_numbers(capsys):
    assert main(["info", "deepseek_v3"]) == 0
    text = capsys.readouterr().out
    for number in ("671,026,419,200", "37,552,297,472", "653,908,770,816", "250.464 GFLOP", "70,272 bytes"):
        assert number in text


def test_a_dense_model_shows_no_experts(capsys):
    assert main(["info", "deepseek_llm_7b"]) == 0
    text = capsys.readouterr().out
    assert "6,910,365,696" in text
    assert "experts" not in text


def test_a_sequence_without_tokens_is_refused(capsys):
    assert main(["info", "tiny", "--seq-len", "0"]) == 2
    assert capsys.readouterr().err == "dsv3: error: --seq-len = 0 must be greater than 0\n"


def test_a_mistyped_option_is_named_as_it_is_typed(capsys):
    assert main(["info", "tiny", "--seq-len", "abc"]) == 2
    assert capsys.readouterr().err == "dsv3: error: --seq-len = 'abc' must be a whole number\n"


@pytest.mark.parametrize("name", ["[/b]", "[b]x", "[red]a[/red]", ":smile:", "a\\[/b]\\"])
def test_a_name_is_no_markup(capsys, name):
    assert main(["info", "tiny", "--name", name]) == 0
    assert name in capsys.readouterr().out
