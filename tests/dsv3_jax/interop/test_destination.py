"""What a conversion replaces when it is told to: weights, and nothing else."""

import fcntl
import json
import shutil

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.interop.convert import convert
from dsv3_jax.interop.destination import MANIFEST
from tests.dsv3_jax.interop.folders import contents, weights


def test_what_is_there_is_replaced_only_when_told_and_only_if_it_is_weights(ragged, tmp_path):
    out, options = tmp_path / "out", {"to": "hf", "dtype": "bf16"}
    convert(ragged / "fp32", out, **options)
    before = contents(out, [])
    with pytest.raises(ConfigError, match=r"out exists: .*--force"):
        convert(ragged / "fp8", out, to="hf")
    assert contents(out, []) == before
    (out / "stale.safetensors").write_bytes(b"old")
    convert(ragged / "fp8", out, to="hf", force=True)
    assert weights(out) == weights(ragged / "fp8")
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"holds letters\.txt, .* so --force does not replace it"):
        convert(ragged / "fp8", home, to="hf", force=True)
    assert [path.name for path in home.iterdir()] == ["letters.txt"]
    with pytest.raises(ConfigError, match="nowhere does not exist: make it first"):
        convert(ragged / "fp8", tmp_path / "nowhere" / "out", to="hf")


def refused(source, out, force=True):
    """The message of a conversion that is refused and changes nothing around ``out``."""
    before = contents(out.parent, [])
    with pytest.raises(ConfigError) as caught:
        convert(source, out, to="hf", force=force)
    assert contents(out.parent, []) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def holder(ragged, tmp_path):
    """A copy of weights in a folder of its own."""
    return shutil.copytree(ragged / "bf16", tmp_path / "holder" / "weights")


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_not_converted_into_itself_or_its_parent(force, holder, tmp_path):
    (tmp_path / "link").symlink_to(holder)
    pairs = [(holder, holder), (holder, holder.parent), (tmp_path / "link", holder)]
    for source, out in [*pairs, (holder, holder.parent / ".." / "holder" / "weights")]:
        assert "name DST elsewhere" in refused(source, out, force)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("thesis.txt", "holds thesis.txt, which is not of a folder of weights"),
        ("config.toml", "holds config.toml,"),
        ("figures/loss.png", "holds figures,"),
        ("model.safetensors/thesis.txt", "holds model.safetensors,"),
        ("metrics.jsonl", "is a run of dsv3 train"),
        ("checkpoints/10/manifest.json", "is a run of dsv3 train"),
        ("manifest.json", "is a checkpoint of dsv3 train"),
    ],
)
def test_force_keeps_a_folder_of_weights_with_anything_else_in_it(name, reason, ragged, holder):
    if name.startswith("model.safetensors"):
        (holder / "model.safetensors").rename(holder / "other.safetensors")
    (holder / name).parent.mkdir(parents=True, exist_ok=True)
    (holder / name).touch()
    assert reason in refused(ragged / "fp8", holder)


@pytest.mark.parametrize("name", ["config.json", "config.toml", MANIFEST])
def test_a_configuration_alone_is_no_weights(name, ragged, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).touch()
    assert "so --force does not replace it: choose another name" in refused(ragged / "fp8", out)
    assert "is no folder" in refused(ragged / "fp8", out / name)


@pytest.mark.parametrize("to", ["hf", "orbax", "torch"])
def test_force_replaces_what_convert_wrote_until_there_is_more(to, ragged, tmp_path):
    out = convert(ragged / "fp8", tmp_path / "out", to=to, shard_bytes=10**6).path
    (out / ".lock").touch()
    assert convert(ragged / "fp8", out, to=to, force=True).path == out
    assert not (out / ".lock").exists()
    (out / "thesis.txt").touch()
    assert "holds thesis.txt," in refused(ragged / "bf16", out)


def test_a_checkpoint_that_was_converted_and_trained_on_is_a_run(ragged, tmp_path):
    whole = convert(ragged / "bf16", tmp_path / "whole", to="orbax").path
    later, optimizer, note = (shutil.copytree(whole, tmp_path / name / "out") for name in "abc")
    shutil.copytree(later / "checkpoints" / "0", later / "checkpoints" / "10")
    manifest = optimizer / "checkpoints" / "0" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["arrays"]["opt_state/mu"] = {"shape": [2], "dtype": "float32"}
    manifest.write_text(json.dumps(told))
    for out in (later, optimizer):
        assert "is a run of dsv3 train" in refused(ragged / "fp8", out)
    (note / "checkpoints" / "0" / "state" / "thesis.txt").touch()
    assert "holds checkpoints/0/state/thesis.txt," in refused(ragged / "fp8", note)


def test_a_run_is_not_replaced(ragged, ragged_config, saved_run, tokenizer, tmp_path):
    (tmp_path / "home").mkdir()
    run = saved_run(tmp_path / "home" / "run", ragged_config, tokenizer)
    assert "is a run of dsv3 train" in refused(ragged / "fp8", run)
    assert "is a checkpoint of dsv3 train" in refused(ragged / "fp8", run / "checkpoints" / "10")


def test_a_folder_that_another_process_holds_is_not_replaced(ragged, holder):
    with (holder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by another process" in refused(ragged / "fp8", holder)
    convert(ragged / "fp8", holder, to="hf", force=True)


@pytest.mark.parametrize(("force", "reason"), [(False, "out exists"), (True, "holds thesis.txt,")])
def test_what_appears_at_the_destination_meanwhile_stays(force, reason, ragged, tmp_path):
    out = tmp_path / "out"

    def appear(*_):
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").touch()

    with pytest.raises(ConfigError, match=reason):
        convert(ragged / "bf16", out, to="hf", force=force, progress=appear)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    report = convert(ragged / "bf16", out, to="hf")
    assert report.resumed_bytes == report.nbytes
