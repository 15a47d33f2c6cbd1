"""Conversions: what changes no bit, what coarser types cost, going on after a kill, and finding what went wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsv3_jax.config import ConfigError, replace
from dsv3_jax.interop import convert as module
from dsv3_jax.interop.block_fp8 import dequantize
from dsv3_jax.interop.convert import MANIFEST, convert
from dsv3_jax.interop.names import leaf_shapes, scale_leaf_shapes, tensors
from dsv3_jax.interop.pretrained import from_pretrained, load_into
from dsv3_jax.interop.source import HFSource, TreeSource
from dsv3_jax.interop.tensor_io import WeightsError
from dsv3_jax.model import abstract_model, split_model
from tests.dsv3_jax.interop import answers
from tests.dsv3_jax.interop.folders import (
    BF16,
    E4M3,
    F16,
    F32,
    config_of,
    contents,
    read_all,
    same_bits,
    weights,
    write_all,
)

DTYPES = ("fp32", "bf16", "fp8")


def state_of(folder):
    (state,) = folder.glob("checkpoints/*/state")
    return state


# --- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_to_a_checkpoint_and_back_changes_no_byte_of_any_file(dtype, ragged, tmp_path):
    convert(ragged / dtype, tmp_path / "ours", to="orbax", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", to="hf", verify=True)
    assert contents(tmp_path / "back") == contents(ragged / dtype)


@pytest.mark.usefixtures("small_slices")
def test_through_pytorchs_files_and_shards_changes_no_byte(ragged, tmp_path):
    convert(ragged / "fp8", tmp_path / "torch", to="torch", shard_bytes=10**6, verify=True)
    assert len(list((tmp_path / "torch").glob("*.bin"))) > 2
    convert(tmp_path / "torch", tmp_path / "ours", to="orbax", allow_pickle=True)
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert contents(tmp_path / "back") == contents(ragged / "fp8")


@pytest.mark.usefixtures("small_slices")
def test_one_thread_and_a_small_buffer_write_the_same_bytes(ragged, tmp_path):
    for name, options in (("a", {"threads": 4}), ("b", {"threads": 1, "buffer_bytes": 2**20})):
        convert(ragged / "fp32", tmp_path / name, to="hf", dtype="fp8", shard_bytes=10**6, **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_fp8_is_kept_as_arrays_of_values_and_of_scales(ragged, ragged_config, tmp_path):
    convert(ragged / "fp8", tmp_path / "ours", to="orbax")
    arrays = ocp.PyTreeCheckpointer().restore(state_of(tmp_path / "ours"))
    model, there = ragged_config.model, read_all(ragged / "fp8")
    shapes = leaf_shapes(model) | scale_leaf_shapes(model)
    assert {name: value.shape for name, value in arrays.items()} == shapes
    assert arrays["scale_inv/moe/moe/gate_up"].shape == (2, 4, 2, 2 * 2)
    assert {str(value.dtype) for value in arrays.values()} == {"float8_e4m3fn", "bfloat16", "float32"}
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    same_bits(arrays["params/moe/moe/gate_up"][1, 3, :, 140:].T, there[name])
    same_bits(arrays["scale_inv/moe/moe/gate_up"][1, 3, :, 2:].T, there[f"{name}_scale_inv"])
    same_bits(arrays["params/embedding/table"], there["model.embed_tokens.weight"])
    same_bits(arrays["router_bias/moe/moe/router/bias"][0], there["model.layers.1.mlp.gate.e_score_correction_bias"])


@pytest.mark.usefixtures("small_slices")
def test_plain_orbax_opens_what_was_cut_into_chunks(ragged, tmp_path):
    convert(ragged / "fp32", tmp_path / "ours", to="orbax")
    found = ocp.PyTreeCheckpointer().restore(state_of(tmp_path / "ours"))
    parts = split_model(from_pretrained(ragged / "fp32").model)
    wanted = jax.tree_util.tree_leaves_with_path({"params": parts.params, "router_bias": parts.router_bias})
    assert len(found) == len(wanted)
    for path, leaf in wanted:
        same_bits(found[jax.tree_util.keystr(path, simple=True, separator="/")], leaf)


def test_a_llama_folder_with_tied_embeddings_goes_through_a_checkpoint(hf_families, tmp_path):
    folder = hf_families["dense_tied"].folder
    convert(folder, tmp_path / "ours", to="orbax", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", to="hf", verify=True)
    back, there = read_all(tmp_path / "back"), read_all(folder)
    there.pop("lm_head.weight", None)
    assert back.keys() == there.keys()
    for name, value in there.items():
        same_bits(back[name], value)
    assert config_of(tmp_path / "back")["tie_word_embeddings"] is True


def test_float16_becomes_float32(ragged, tmp_path):
    halves = {name: value.astype(F16) for name, value in read_all(ragged / "fp32").items()}
    folder = write_all(tmp_path / "half", halves, config_of(ragged / "fp32"))
    convert(folder, tmp_path / "out", to="hf", verify=True)
    for name, value in read_all(tmp_path / "out").items():
        same_bits(value, halves[name].astype(F32))


# --- coarser types ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(ragged, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    convert(ragged / "bf16", folder / "fp8", to="hf", dtype="fp8")
    convert(folder / "fp8", folder / "bf16", to="hf", dtype="bf16")
    return read_all(ragged / "bf16"), read_all(folder / "fp8"), read_all(folder / "bf16"), folder


def test_bf16_to_fp8_and_back_is_within_the_error_of_the_format(quantized):
    before, values, after, _ = quantized
    assert after.keys() == before.keys()
    inside = 0
    for name, x in before.items():
        if values[name].dtype != E4M3:
            same_bits(values[name], x)
            same_bits(after[name], x)
            continue
        inside += 1
        x, scale = x.astype(np.float64), values[f"{name}_scale_inv"].astype(np.float64)
        spread = np.kron(scale, np.ones((128, 128)))[: x.shape[0], : x.shape[1]]
        y = after[name].astype(np.float64)
        # Half a step of e4m3 (2^-4 of a normal number, 2^-10 of the scale below; spec 28) and half of one of bfloat16.
        allowed = np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * spread) * (1 + 1e-6) + 2.0**-8 * np.abs(y)
        assert (np.abs(y - x) <= allowed).all(), name
    assert inside == len([name for name in values if name.endswith("_scale_inv")]) > 50


def test_fp8_to_bf16_multiplies_in_float32_and_rounds_once(quantized):
    _, values, after, _ = quantized
    for name, value in values.items():
        if value.dtype == E4M3:
            same_bits(after[name], dequantize(value, values[f"{name}_scale_inv"], BF16))


def test_config_and_names_tell_the_type(quantized):
    _, values, after, folder = quantized
    assert config_of(folder / "fp8")["quantization_config"]["quant_method"] == "fp8"
    assert "quantization_config" not in config_of(folder / "bf16")
    biases = {name for name, value in after.items() if value.dtype == F32}
    assert biases == {name for name in after if name.endswith("e_score_correction_bias")}
    assert {name for name, value in values.items() if value.dtype == F32} - biases == {
        f"{name}_scale_inv" for name, value in values.items() if value.dtype == E4M3
    }


def test_what_fp8_cannot_hold_is_named(ragged, tmp_path):
    there = read_all(ragged / "fp32")
    there["model.layers.1.mlp.experts.2.up_proj.weight"][7, 5] = np.nan
    folder = write_all(tmp_path / "nan", there, config_of(ragged / "fp32"))
    with pytest.raises(WeightsError, match=r"^model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight cannot .* FP8"):
        convert(folder, tmp_path / "out", to="hf", dtype="fp8")
    assert not (tmp_path / "out").exists()


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, saved_run, run_config, tokenizer):
    config = run_config({"ema_decay": 0.9}, num_nextn_predict_layers=1)
    return saved_run(tmp_path_factory.mktemp("runs") / "a", config, tokenizer, ema=True), config


@pytest.mark.parametrize(
    ("choice", "seed"),
    [({}, 30), ({"step": 10}, 10), ({"weights": "best"}, 20), ({"weights": "ema"}, 31)],
    ids=["newest", "step", "best", "ema"],
)
def test_a_run_goes_out_with_the_weights_asked_for(choice, seed, run, drawn_parts, tmp_path):
    folder, config = run
    convert(folder, tmp_path / "out", to="hf", verify=True, **choice)
    biases = drawn_parts(config.model, 30 if seed == 31 else seed).router_bias
    wanted = {"params": drawn_parts(config.model, seed).params, "router_bias": biases}
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    source = TreeSource({jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths})
    found = read_all(tmp_path / "out")
    for tensor in tensors(config.model):
        same_bits(found.pop(tensor.name), source.rows(tensor, 0, tensor.shape[0]))
    assert not found
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    told = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert told["step"] == (30 if seed == 31 else seed)


def test_choices_of_a_run_mean_nothing_for_a_folder_of_theirs(ragged, tmp_path):
    for choice in ({"step": 3}, {"weights": "ema"}):
        with pytest.raises(ConfigError, match="--step and --weights are for runs"):
            convert(ragged / "bf16", tmp_path / "out", to="orbax", **choice)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_training_begins_with_what_was_converted(kind, ragged, ragged_config, tmp_path):
    source = ragged / "fp32"
    if kind == "orbax":
        source = convert(source, tmp_path / "ours", to="orbax").path
    parts = split_model(abstract_model(ragged_config.model))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"params": parts.params, "router_bias": parts.router_bias},
    )
    given = load_into(source, abstract)
    same = split_model(from_pretrained(ragged / "fp32").model)
    wanted = {"params": same.params, "router_bias": same.router_bias}
    assert jax.tree.structure(given) == jax.tree.structure(wanted)
    for left, right in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        assert left.sharding == sharding
        same_bits(left, right)
    other = replace(ragged_config, model={"intermediate_size": 304, "num_nextn_predict_layers": 0})
    parts = split_model(abstract_model(other.model))
    with pytest.raises(
        ConfigError, match=r"dense/ffn/down/kernel is \[1, 300, 200\] there and \[1, 304, 200\] here.*mtp"
    ):
        load_into(source, {"params": parts.params, "router_bias": parts.router_bias})


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"])
def test_copies_that_differ_are_refused_by_name(name, ragged, tmp_path):
    there = read_all(ragged / "bf16")
    there[name][299, 199] += 1
    folder = write_all(tmp_path / "odd", there, config_of(ragged / "bf16"))
    with pytest.raises(WeightsError, match=f"^{name} differs from (model.embed_tokens|lm_head).weight: "):
        convert(folder, tmp_path / "out", to="orbax")
    convert(folder, tmp_path / "same", to="hf")
    same_bits(read_all(tmp_path / "same")[name], there[name])


def test_copies_may_be_left_out(ragged, tmp_path):
    there = read_all(ragged / "bf16")
    for name in ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"):
        del there[name]
    folder = write_all(tmp_path / "few", there, config_of(ragged / "bf16"))
    convert(folder, tmp_path / "ours", to="orbax")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    assert weights(tmp_path / "back") == weights(ragged / "bf16")


# --- stopped and resumed ----------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_after(share):
    def progress(phase, done, total):
        if done >= share * total:
            raise Stopped

    return progress


@pytest.fixture
def rows_read(monkeypatch):
    """Bytes of rows read from a Hugging Face folder, as a list of one number."""
    read, original = [0], HFSource.rows

    def rows(self, tensor, start, stop):
        found = original(self, tensor, start, stop)
        read[0] += found.nbytes
        return found

    monkeypatch.setattr(HFSource, "rows", rows)
    return read


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("to", ["hf", "orbax", "torch"])
def test_a_stopped_conversion_goes_on_where_it_was(to, ragged, tmp_path, rows_read):
    options = {"to": to, "dtype": "fp8", "threads": 1, "shard_bytes": 10**6}
    whole = convert(ragged / "fp32", tmp_path / "whole", **options)
    once = rows_read[0]
    for share in (0.3, 0.6):
        with pytest.raises(Stopped):
            convert(ragged / "fp32", tmp_path / "parts", **options, progress=stop_after(share))
    assert not (tmp_path / "parts").exists()
    rows_read[0] = 0
    seen = []
    report = convert(ragged / "fp32", tmp_path / "parts", **options, progress=lambda *told: seen.append(told))
    assert 0.6 * whole.nbytes <= report.resumed_bytes < whole.nbytes
    assert seen[0] == ("convert", report.resumed_bytes, whole.nbytes)
    assert seen[-1] == ("convert", whole.nbytes, whole.nbytes)
    assert rows_read[0] <= once - report.resumed_bytes + 2 * 300 * 200 * 4  # copies are read beside their originals
    changing = [
        name for name in contents(tmp_path / "whole") if name.endswith(("_CHECKPOINT_METADATA", "manifest.json"))
    ]
    assert contents(tmp_path / "parts", [MANIFEST, *changing]) == contents(tmp_path / "whole", [MANIFEST, *changing])
    assert (tmp_path / "parts" / MANIFEST).read_text() == (tmp_path / "whole" / MANIFEST).read_text()
    assert not list(tmp_path.glob(".*"))


KILLED = """
import os, signal, sys
from dsv3_jax.interop import sink, transfer
from dsv3_jax.interop.convert import convert
transfer.CHUNK_ELEMENTS = sink.CHUNK_ELEMENTS = 2**14
def progress(phase, done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], to="hf", dtype="bf16", shard_bytes=10**6, threads=2, progress=progress)
"""


@pytest.mark.usefixtures("small_slices")
def test_a_killed_process_leaves_what_the_next_one_goes_on_with(ragged, tmp_path):
    command = [sys.executable, "-c", KILLED, str(ragged / "fp32"), str(tmp_path / "out")]
    killed = subprocess.run(command, cwd=answers.ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    options = {"to": "hf", "dtype": "bf16", "shard_bytes": 10**6}
    report = convert(ragged / "fp32", tmp_path / "out", **options)
    assert 0.4 * report.nbytes < report.resumed_bytes < report.nbytes
    convert(ragged / "fp32", tmp_path / "whole", **options)
    assert contents(tmp_path / "out", []) == contents(tmp_path / "whole", [])


def test_another_type_or_a_changed_source_starts_over(ragged, tmp_path):
    source = shutil.copytree(ragged / "fp32", tmp_path / "source")
    out = tmp_path / "out"
    for share in (0.5, 0.5):
        with pytest.raises(Stopped):
            convert(source, out, to="hf", dtype="bf16", threads=1, progress=stop_after(share))
    assert convert(source, out, to="hf", dtype="fp8").resumed_bytes == 0
    with pytest.raises(Stopped):
        convert(source, tmp_path / "b", to="hf", threads=1, progress=stop_after(0.5))
    os.utime(source / "model.safetensors", (1, 1))
    assert convert(source, tmp_path / "b", to="hf").resumed_bytes == 0


def test_a_line_half_written_to_the_journal_is_done_again(ragged, tmp_path):
    options = {"to": "hf", "dtype": "bf16", "threads": 1}
    with pytest.raises(Stopped):
        convert(ragged / "fp32", tmp_path / "out", **options, progress=stop_after(0.5))
    journal = tmp_path / ".out.converting" / "journal.txt"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines)[:-3])
    report = convert(ragged / "fp32", tmp_path / "out", **options)
    assert report.resumed_bytes > 0
    same = convert(ragged / "fp32", tmp_path / "whole", **options).path
    assert contents(tmp_path / "out", []) == contents(same, [])


# --- checks -----------------------------------------------------------------------------------------------------------


def test_a_failure_leaves_what_was_there(ragged, tmp_path):
    out = convert(ragged / "bf16", tmp_path / "out", to="hf").path
    before = contents(out, [])
    with pytest.raises(Stopped):
        convert(ragged / "fp8", out, to="hf", force=True, threads=1, progress=stop_after(0.9))
    assert contents(out, []) == before


@pytest.mark.parametrize("to", ["hf", "orbax", "torch"])
def test_a_bit_that_changes_on_the_disk_is_found(to, ragged, tmp_path, monkeypatch):
    compare = module.compare

    def flipped(units, *rest, **options):
        partial = tmp_path / ".out.converting"
        patterns = {"hf": "model.safetensors", "torch": "*.bin", "orbax": "**/params/embedding/table/0.0"}
        (file,) = partial.glob(patterns[to])
        data = bytearray(file.read_bytes())
        data[len(data) * 3 // 4] ^= 4
        file.write_bytes(data)
        return compare(units, *rest, **options)

    convert(ragged / "fp8", tmp_path / "good", to=to, verify=True)
    monkeypatch.setattr(module, "compare", flipped)
    with pytest.raises(WeightsError, match=r"^read back and different: [a-z_.0-9]+; convert again"):
        convert(ragged / "fp8", tmp_path / "out", to=to, verify=True)
    assert not (tmp_path / "out").exists()
    convert(ragged / "fp8", tmp_path / "out", to=to)


def test_the_manifest_has_the_checksum_of_every_tensor(quantized):
    _, values, _, folder = quantized
    told = json.loads((folder / "fp8" / MANIFEST).read_text())
    assert (told["layout"], told["dtype"], told["step"]) == ("hf", "fp8", 0)
    tensors_without_scales = {name for name in values if not name.endswith("_scale_inv")}
    assert told["tensors"].keys() == tensors_without_scales
    for name in tensors_without_scales:
        assert told["tensors"][name] == [zlib.crc32(values[name].tobytes())]
