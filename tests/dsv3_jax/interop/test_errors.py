"""What is wrong with a folder is one line that names the files and every tensor, here and on the command line."""

import json
import re
import shutil

import numpy as np
import pytest

from dsv3_jax.cli.main import DONE, FAILURE, USER_MISTAKE, main
from dsv3_jax.config import ConfigError
from dsv3_jax.interop.convert import convert
from dsv3_jax.interop.pretrained import from_pretrained
from dsv3_jax.interop.tensor_io import WeightsError
from tests.dsv3_jax.interop.folders import BF16, E4M3, F32, config_of, contents, read_all, same_bits, write_all


@pytest.fixture
def changed(ragged, tmp_path):
    """``(dtype, change) -> folder`` with tensors as ``change(dict)`` leaves them."""

    def make(dtype, change=lambda tensors: None, **config):
        tensors = read_all(ragged / dtype)
        change(tensors)
        return write_all(tmp_path / "changed", tensors, config_of(ragged / dtype) | config)

    return make


def refusal(folder, error=WeightsError, **arguments):
    with pytest.raises(error) as caught:
        from_pretrained(folder, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_everything_wrong_is_in_one_message(changed):
    def spoil(tensors):
        for expert in (0, 1, 3):
            del tensors[f"model.layers.2.mlp.experts.{expert}.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.gate_proj.bias"] = np.zeros(3, F32)
        tensors["model.layers.9.input_layernorm.weight"] = np.zeros(200, F32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
        tensors["model.layers.1.self_attn.kv_b_proj.weight"] = np.zeros((55, 24), F32)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.int32)
        tensors["model.layers.1.mlp.gate.weight"] = np.zeros((4, 200), np.float64)

    message = refusal(changed("fp32", spoil))
    faults = dict(re.findall(r"(\d+ (?:missing|unexpected|of another shape|of a type))[^:]*: (.*?)(?=; \d|$)", message))
    assert faults == {
        "4 missing": "model.layers.2.mlp.experts.{0-1,3}.up_proj.weight, model.norm.weight",
        "2 unexpected": "model.layers.0.mlp.gate_proj.bias, model.layers.9.input_layernorm.weight",
        "2 of another shape": (
            "model.layers.1.self_attn.kv_b_proj.weight is [55, 24], config.json says [56, 24], "
            "lm_head.weight is [200, 300], config.json says [300, 200]"
        ),
        "2 of a type": "model.embed_tokens.weight is int32, model.layers.1.mlp.gate.weight is float64",
    }


def test_every_fault_of_the_scales_is_in_one_message(changed):
    def spoil(tensors):
        del tensors["model.layers.0.mlp.gate_proj.weight_scale_inv"]
        tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = np.ones((2, 2), F32)
        tensors["model.layers.0.mlp.down_proj.weight_scale_inv"] = np.ones((2, 3), BF16)
        tensors["model.norm.weight"] = np.ones(200, E4M3)
        tensors["model.layers.1.mlp.gate.weight_scale_inv"] = np.ones((1, 2), F32)

    message = refusal(changed("fp8", spoil))
    assert "1 missing: model.layers.0.mlp.gate_proj.weight_scale_inv;" in message
    assert "1 unexpected: model.layers.1.mlp.gate.weight_scale_inv;" in message
    assert "1 of another shape: model.layers.0.mlp.up_proj.weight_scale_inv is [2, 2], not [3, 2];" in message
    assert "model.norm.weight is FP8, which only matrices may be" in message
    assert "model.layers.0.mlp.down_proj.weight_scale_inv is bfloat16, not float32" in message


def test_part_of_a_prediction_layer_is_missing_tensors_and_none_of_it_is_a_model_without(changed, tmp_path, caplog):
    def drop(tensors, keep):
        for name in [name for name in tensors if name.startswith("model.layers.3.") and keep not in name]:
            del tensors[name]

    folder = changed("bf16", lambda tensors: drop(tensors, "enorm"))
    assert "missing: model.layers.3.input_layernorm.weight, " in refusal(folder)
    shutil.rmtree(folder)
    folder = changed("bf16", lambda tensors: drop(tensors, "nothing"))
    loaded = from_pretrained(folder)
    assert loaded.config.model.num_nextn_predict_layers == 0
    assert "declares 1 MTP layer(s) and holds none" in caplog.text
    convert(folder, tmp_path / "out", to="orbax")
    assert from_pretrained(tmp_path / "out").config.model.num_nextn_predict_layers == 0


def test_buffers_of_old_exports_are_passed_over(changed):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    from_pretrained(changed("bf16", lambda tensors: tensors.update({name: np.ones(4, F32)})))


def test_fp8_in_part_of_the_layers_cannot_be_kept_as_one_array(changed, ragged, tmp_path):
    name = "model.layers.2.mlp.experts.1.down_proj.weight"

    def mix(tensors):
        tensors[name] = read_all(ragged / "bf16")[name]
        del tensors[f"{name}_scale_inv"]

    folder = changed("fp8", mix)
    with pytest.raises(ConfigError, match=r"--dtype keep: FP8 in part of the layers of params/moe/moe/down; choose"):
        convert(folder, tmp_path / "out", to="orbax")
    convert(folder, tmp_path / "out", to="orbax", dtype="bf16")
    convert(tmp_path / "out", tmp_path / "back", to="hf")
    same_bits(read_all(tmp_path / "back")[name], read_all(folder)[name])


# --- damaged files ----------------------------------------------------------------------------------------------------


def test_a_truncated_shard_is_named_with_its_tensor(ragged, tmp_path):
    folder = convert(ragged / "bf16", tmp_path / "cut", to="hf", shard_bytes=10**6).path
    file = sorted(folder.glob("*.safetensors"))[1]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 10)
    message = refusal(folder)
    assert file.name in message
    assert re.search(r"(model\.layers\.|lm_head|model\.norm|model\.embed)\S+", message)


def test_a_corrupt_header_is_named_with_its_file(ragged, tmp_path):
    folder = shutil.copytree(ragged / "bf16", tmp_path / "bad")
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(8)
        stream.write(b"\xff\xfe")
    assert "model.safetensors" in refusal(folder)


def test_a_shard_that_shrinks_while_it_is_read_is_named(ragged, tmp_path):
    folder = shutil.copytree(ragged / "bf16", tmp_path / "shrinks")

    def shrink(phase, done, total):
        with (folder / "model.safetensors").open("r+b") as stream:
            stream.truncate(20_000)

    with pytest.raises(WeightsError, match=r"model\.safetensors: ends at byte 20000, inside its data"):
        convert(folder, tmp_path / "out", to="hf", dtype="fp32", progress=shrink)


def test_an_index_that_leads_outside_is_refused(ragged, tmp_path):
    folder = convert(ragged / "bf16", tmp_path / "out", to="hf", shard_bytes=10**6).path
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["lm_head.weight"] = "../bf16/model.safetensors"
    index.write_text(json.dumps(told))
    assert "../bf16/model.safetensors leads outside the folder, which is refused" in refusal(folder)


# --- what is not read -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pickled(ragged, tmp_path_factory):
    return convert(ragged / "bf16", tmp_path_factory.mktemp("torch") / "pickled", to="torch").path


def test_pickles_are_read_only_when_asked_for(pickled, ragged):
    remedy = f"which can run code; convert it first: dsv3 convert {pickled} OUT --to hf --allow-pickle"
    assert refusal(pickled).endswith(f"only pickles (pytorch_model.bin), {remedy}")
    from_pretrained(pickled, allow_pickle=True)


def test_an_architecture_that_is_not_computed_is_refused_before_weights_are_read(changed):
    assert "attention_bias = True" in refusal(changed("bf16", attention_bias=True), ConfigError)


@pytest.mark.parametrize("inside", [(), ("notes.txt",)])
def test_a_folder_of_nothing_is_one_line(tmp_path, inside):
    for name in inside:
        (tmp_path / name).write_text("")
    assert str(tmp_path) in refusal(tmp_path, ConfigError)


# --- the command line -------------------------------------------------------------------------------------------------


def command(capsys, *words):
    """Status, and what was said on stderr."""
    status = main(["convert", *map(str, words)])
    return status, capsys.readouterr().err


def test_the_command_converts_both_ways(ragged, tmp_path, capsys):
    assert command(capsys, ragged / "fp8", tmp_path / "ours", "--verify") == (DONE, "")
    assert (tmp_path / "ours" / "checkpoints" / "0" / "state").is_dir()
    status = main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--shard-gb", "0.0005"])
    assert status == DONE
    assert re.search(r"back: \d+ tensors, 0\.00 GB read in", capsys.readouterr().out.replace("\n", " "))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1


def test_mistakes_are_status_2_and_one_line(ragged, pickled, changed, tmp_path, capsys):
    out = tmp_path / "out"
    broken = changed("bf16", lambda tensors: tensors.pop("model.norm.weight"))
    cases = {
        (tmp_path / "nowhere", out): "does not exist",
        (ragged / "bf16", ragged / "fp8"): "--force",
        (ragged / "bf16", out, "--step", "3"): "--step",
        (ragged / "bf16", out, "--dtype", "fp7"): "fp7",
        (ragged / "bf16", out, "--buffer-mb", "0"): "--buffer-mb = 0",
        (ragged / "bf16", out, "--buffer-mb", str(10**400)): "--buffer-mb = 1000",
        (ragged / "bf16", out, "--shard-gb", "nan"): "--shard-gb = nan must be greater than 0 and at most 1e9",
        (ragged / "bf16", out, "--shard-gb", "inf"): "--shard-gb = inf",
        (ragged / "bf16", out, "--shard-gb", "1e300"): "--shard-gb = 1e+300",
        (ragged / "bf16", ragged / "bf16", "--force"): "name DST elsewhere",
        (ragged / "bf16",): "DST",
        (pickled, out): "--allow-pickle",
        (broken, out): "missing: model.norm.weight",
    }
    for words, part in cases.items():
        status, said = command(capsys, *words)
        assert (status, said.count("\n")) == (USER_MISTAKE, 1), said
        assert part in said
        assert "Traceback" not in said
    assert not out.exists()
    assert command(capsys, pickled, out, "--allow-pickle", "--to", "hf")[0] == DONE
    assert contents(out)["model.safetensors"] == contents(ragged / "bf16")["model.safetensors"]


def test_a_damaged_checkpoint_is_status_1_and_one_line(ragged, tmp_path, capsys):
    convert(ragged / "bf16", tmp_path / "ours", to="orbax")
    (chunk,) = (tmp_path / "ours").glob("checkpoints/0/state/params/final_norm/scale/0")
    chunk.write_bytes(chunk.read_bytes()[:-2])
    status, said = command(capsys, tmp_path / "ours", tmp_path / "out")
    assert (status, said.count("\n")) == (FAILURE, 1)
    assert "params/final_norm/scale" in said
