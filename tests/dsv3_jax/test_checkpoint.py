"""Checkpoints are whole or invisible, exact, sharding-independent, and damage to them is named."""

import contextlib
import json
import resource
import shutil
import subprocess
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import checkpoint
from dsv3_jax.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    best_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    read_info,
    restore,
    stored_arrays,
    verify,
)


class Moments(NamedTuple):
    mu: dict
    nu: dict


def _tree(seed: int = 0, rows: int = 8):
    rng = np.random.default_rng(seed)
    wide = jnp.asarray(rng.standard_normal((rows, 64)), jnp.float32)
    return {
        "params": {"trunk": {"norm": {"scale": wide[0]}, "q": {"kernel": wide}}},
        "router_bias": {},
        "opt_state": (Moments({"q": wide.astype(jnp.bfloat16)}, {"q": (wide**2).astype(jnp.bfloat16)}), ()),
        "ema": None,
        "counts": jnp.zeros((0, 4)),
        "nonfinite": jnp.int32(3),
    }


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def _writer(folder, keep=2):
    return CheckpointWriter(folder, keep=keep, config_toml='name = "toy"\n')


def _saved(folder, steps=(1,), keep=9):
    with _writer(folder, keep) as writer:
        for step in steps:
            writer.save(_tree(step), step=step, tokens=step * 10, data={"row": step})
    return folder


def _steps(folder):
    return [int(p.name) for p in list_checkpoints(folder)]


def test_everything_saved_comes_back_bit_for_bit(tmp_path):
    with CheckpointWriter(tmp_path / "c", keep=1, config_toml='name = "toy"\n') as writer:
        writer.save(
            _tree(), step=7, tokens=14_800_000_000_001, data={"rows": [1, 2]}, val_bpb=2.5, extra={"seconds": 3.5}
        )
    path = newest_checkpoint(tmp_path / "c")
    assert path is not None
    _same(restore(path, _abstract(_tree())), _tree())
    info = read_info(path)
    assert (info.step, info.tokens, info.val_bpb, info.data, info.extra) == (
        7,
        14_800_000_000_001,
        2.5,
        {"rows": [1, 2]},
        {"seconds": 3.5},
    )
    assert (path / "config.toml").read_text() == 'name = "toy"\n'


def test_arrays_donated_right_after_save_do_not_change_what_is_saved(tmp_path):
    tree = {"a": jnp.arange(300_000, dtype=jnp.float32), "b": jnp.ones((500, 500), jnp.bfloat16)}
    expected = jax.tree.map(np.array, tree)
    overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    with _writer(tmp_path / "c") as writer:
        writer.save(tree, step=1, tokens=1, data={})
        for _ in range(5):
            tree = overwrite(tree)
        jax.block_until_ready(tree)
    _same(restore(tmp_path / "c" / "1", _abstract(expected)), jax.tree.map(jnp.asarray, expected))


def test_save_returns_while_the_writing_goes_on(tmp_path, monkeypatch):
    gate = threading.Event()
    inventory = checkpoint._inventory
    monkeypatch.setattr(checkpoint, "_inventory", lambda folder: inventory(folder) if gate.wait(20) else {})
    with _writer(tmp_path / "c") as writer:
        writer.save(_tree(), step=1, tokens=1, data={})
        assert _steps(tmp_path / "c") == []
        gate.set()
    assert _steps(tmp_path / "c") == [1]


def test_weights_alone_can_be_read_by_their_path(tmp_path):
    _saved(tmp_path / "c")
    part = {"params": _abstract(_tree(1)["params"])}
    _same(restore(tmp_path / "c" / "1", part, partial=True), {"params": _tree(1)["params"]})
    with pytest.raises(CheckpointError, match="has an array"):
        restore(tmp_path / "c" / "1", part)


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    _saved(tmp_path / "c")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    wanted = {"params": {"trunk": {"q": {"kernel": jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=sharding)}}}}
    kernel = restore(tmp_path / "c" / "1", wanted, partial=True)["params"]["trunk"]["q"]["kernel"]
    assert kernel.sharding == sharding
    np.testing.assert_array_equal(kernel, _tree(1)["params"]["trunk"]["q"]["kernel"])


def test_the_newest_and_the_best_by_validation_are_kept(tmp_path):
    scores = {1: 3.0, 2: 2.0, 3: 2.5, 4: None, 5: 2.6}
    with _writer(tmp_path, keep=2) as writer:
        for step, score in scores.items():
            writer.save({"a": jnp.ones(3)}, step=step, tokens=step, data={}, val_bpb=score)
            if step == 4:
                writer.wait()
                # 1 made room for 3: a save leaves one more than is kept until the next one or the end.
                assert _steps(tmp_path) == [2, 3, 4]
    assert _steps(tmp_path) == [2, 4, 5]
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.name == "2"


def test_other_shapes_types_and_names_are_refused_by_name(tmp_path):
    path = _saved(tmp_path / "c") / "1"
    for key, leaf, message in (
        ("nonfinite", jax.ShapeDtypeStruct((2,), jnp.int32), r"nonfinite as int32\[\], .* as int32\[2\]"),
        ("nonfinite", jax.ShapeDtypeStruct((), jnp.float32), r"nonfinite as int32\[\], .* as float32\[\]"),
        ("other", jax.ShapeDtypeStruct((), jnp.float32), "no array other"),
    ):
        with pytest.raises(CheckpointError, match=message):
            restore(path, _abstract(_tree()) | {key: leaf})


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damage_is_named_with_the_last_good_checkpoint_and_not_passed_over(tmp_path, damage):
    _saved(tmp_path / "c", steps=(1, 2, 3))
    path = tmp_path / "c" / "3"
    manifest = json.loads((path / "manifest.json").read_text())
    file = path / max(manifest["files"], key=lambda name: manifest["files"][name]["bytes"])
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
        fault = f"{file.name} has {len(content) // 2} bytes where {len(content)} were written"
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        fault = f"{file.name} has changed"
    elif damage == "remove":
        file.unlink()
        fault = f"{file.name} is missing"
    else:
        (path / "manifest.json").write_text("{")
        fault = "manifest.json cannot be read"
    with pytest.raises(CheckpointError) as caught:
        restore(path, _abstract(_tree()))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"checkpoint {path} is damaged: ")
    assert fault in message
    assert f"the newest good one is {tmp_path / 'c' / '2'}; delete 3" in message
    shutil.rmtree(path)
    newest = newest_checkpoint(tmp_path / "c")
    assert newest is not None
    _same(restore(newest, _abstract(_tree())), _tree(2))


@pytest.mark.parametrize(
    "text",
    ["[1]", "{}", '{"arrays": [], "files": {}}', '{"arrays": {"a": 1}, "files": {}}', '{"arrays": {}, "files": 2}'],
)
def test_a_manifest_of_another_form_is_damage(tmp_path, text):
    _saved(tmp_path / "c")
    (tmp_path / "c" / "1" / "manifest.json").write_text(text)
    for read in (verify, stored_arrays):
        with pytest.raises(CheckpointError, match=r"damaged: manifest\.json cannot be read \(it does not list[^\n]*$"):
            read(tmp_path / "c" / "1")


def test_the_only_checkpoint_damaged_says_so(tmp_path):
    _saved(tmp_path / "c")
    (tmp_path / "c" / "1" / "info.json").unlink()
    with pytest.raises(CheckpointError, match=r"info\.json is missing; there is no other good one .* delete 1 to"):
        verify(tmp_path / "c" / "1")


def test_what_a_killed_save_left_is_invisible_and_cleared_away(tmp_path):
    _saved(tmp_path / "c")
    shutil.copytree(tmp_path / "c" / "1", tmp_path / "c" / ".2.partial")
    assert _steps(tmp_path / "c") == [1]
    with _writer(tmp_path / "c"):
        pass
    assert not (tmp_path / "c" / ".2.partial").exists()


@contextlib.contextmanager
def _small_disk(folder):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root: the full disk is shown by the file size limit alone")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def _file_size_limit(folder):
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("disk", "reason"),
    [(_small_disk, "No space left on device"), (_file_size_limit, "File too large")],
    ids=["tmpfs", "file size limit"],
)
def test_a_full_disk_is_one_line_and_loses_nothing_already_saved(tmp_path, disk, reason):
    folder = tmp_path / "disk"
    with disk(folder):
        with _writer(folder, keep=1) as writer:
            writer.save(_tree(1), step=1, tokens=1, data={})
        with pytest.raises(CheckpointError) as caught, _writer(folder, keep=1) as writer:  # noqa: PT012
            writer.save(_tree(2, rows=20_000), step=2, tokens=2, data={})
            writer.wait()
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith("checkpoint of step 2 could not be written ")
        assert reason in message
        assert f"the newest complete one is {folder / '1'}" in message
        # A write that was under way when another failed may still land in the hidden folder: the next writer clears it.
        assert _steps(folder) == [1]
        with _writer(folder, keep=1):
            assert sorted(p.name for p in folder.iterdir()) == ["1"]
        _same(restore(folder / "1", _abstract(_tree())), _tree(1))


def test_an_earlier_failure_surfaces_at_the_next_save(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(28, "No space left on device")

    with _writer(tmp_path / "c") as writer:
        monkeypatch.setattr(checkpoint, "_inventory", fail)
        writer.save(_tree(), step=1, tokens=1, data={})
        with pytest.raises(CheckpointError, match=r"step 1 could not be written .No space left on device."):
            writer.save(_tree(), step=2, tokens=2, data={})
        writer.raise_if_failed()
    assert _steps(tmp_path / "c") == []
