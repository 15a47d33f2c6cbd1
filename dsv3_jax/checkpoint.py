"""Checkpoints: everything a run needs to go on, written in the background, made visible whole or not at all.

One checkpoint is a folder ``checkpoints/STEP``::

    state/          the arrays, by Orbax; restores onto any devices
    info.json       step, consumed tokens, data state, validation, whatever the caller adds
    config.toml     the resolved configuration
    tokenizer.json  where the run has one
    manifest.json   every array's shape and type, every file's size and checksum

It is written under a hidden name and renamed when complete, so a kill at any moment or a full disk leaves only whole
checkpoints. Damage done later is found before restoring, and named; nothing falls back silently to an older one.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dsv3_jax.chunks import stacked_axes

_CHUNK_BYTES = 8 * 2**20
"""Largest piece of an array that is compressed, and later decompressed, at once; a reader holds several copies."""

_CHECKSUM_LIMIT = 8 * 2**30
"""Bytes up to which a checkpoint's files get checksums; larger ones are compared by size alone."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, told in one line that names it and says how to go on."""


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What ``info.json`` says."""

    path: Path
    step: int
    tokens: int
    """Tokens consumed."""
    val_bpb: float | None
    """Validation in bits per byte, where it was measured at this very step."""
    data: dict[str, Any]
    """State of the data stream after this step."""
    extra: dict[str, Any]
    """What the caller added."""


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, ``OUT/checkpoints/STEP``, oldest first; unfinished ones are not among them."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or ``None``."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation, the earliest of equals, or ``None`` where none was measured."""
    scores = [(score, int(p.name), p) for p in list_checkpoints(folder) if (score := _score(p)) is not None]
    return min(scores)[2] if scores else None


def read_info(path: Path) -> CheckpointInfo:
    """``info.json`` of a checkpoint.

    Raises:
        CheckpointError: it is missing or broken.
    """
    try:
        told = json.loads((path / "info.json").read_text(encoding="utf-8"))
        return CheckpointInfo(path, told["step"], told["tokens"], told["val_bpb"], told["data"], told["extra"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"info.json cannot be read ({_one_line(error)})") from error


def verify(path: Path) -> dict[str, Any]:
    """Compare a checkpoint with its manifest, file by file, and return the manifest.

    Raises:
        CheckpointError: a file is missing, shorter, longer or changed; names it, and the newest undamaged checkpoint.
    """
    fault, manifest = _fault(path)
    if fault:
        raise _damaged(path, fault)
    return manifest


def write_manifest(path: Path, arrays: Mapping[str, Mapping[str, Any]]) -> None:
    """Seal a checkpoint: ``manifest.json`` of its arrays (shape and dtype by name) and of every file now in it."""
    told = {"arrays": dict(arrays), "files": _inventory(path)}
    _write_synced(path / "manifest.json", json.dumps(told, indent=1))


def stored_arrays(path: Path) -> dict[str, dict[str, Any]]:
    """Shape and dtype of every array of a checkpoint, by name, as its manifest has them.

    Raises:
        CheckpointError: the manifest is missing or broken.
    """
    try:
        return _read_manifest(path)["arrays"]
    except (OSError, ValueError) as error:
        raise _damaged(path, f"manifest.json cannot be read ({_one_line(error)})") from error


def restore(path: Path, abstract: Any, *, partial: bool = False) -> Any:
    """The arrays of a checkpoint, laid onto devices as ``abstract`` says.

    Args:
        path: ``checkpoints/STEP``.
        abstract: tree of ``jax.ShapeDtypeStruct``, with shardings for any mesh (without: the default device). Leaves
            are found by their path in the tree, so plain dicts can stand in for the classes that were saved.
        partial: allow ``abstract`` to name only some of the arrays.

    Raises:
        CheckpointError: damage, or arrays that are not there or have another shape or type.
    """
    manifest = verify(path)
    wanted, structure = _flatten(abstract)
    _match(path, manifest["arrays"], wanted, partial)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
        for name, leaf in wanted.items()
    }
    stored = {name: leaf for name, leaf in placed.items() if leaf.size}
    args = ocp.args.PyTreeRestore(
        stored, restore_args=ocp.checkpoint_utils.construct_restore_args(stored), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(path.resolve() / "state", args=args)
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, f"Orbax cannot read it ({_one_line(error)})") from error
    empty = {
        name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) for name, leaf in placed.items() if not leaf.size
    }
    return jax.tree.unflatten(structure, [(found | empty)[name] for name in wanted])


class CheckpointWriter:
    """Saves into ``folder`` in the background, one save at a time; keeps the newest ``keep`` and the best.

    A save deletes only what was too old before it: whether its state is good shows in the steps after it. Leaving
    brings the number down to ``keep``.

    Use as a context manager: leaving it waits for the last save, unless by KeyboardInterrupt. Every process of a run
    makes one; process 0 writes what is not an array and decides what is kept.
    """

    def __init__(self, folder: Path, *, keep: int, config_toml: str, tokenizer_json: Path | None = None):
        self.folder, self.keep = folder.resolve(), keep
        self._texts = {"config.toml": config_toml}
        self._tokenizer = tokenizer_json
        self._primary = jax.process_index() == 0
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        if self._primary:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(".*"):
                shutil.rmtree(left_over, ignore_errors=True)
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        logging.getLogger("absl").addFilter(_not_from_orbax)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("absl").removeFilter(_not_from_orbax)
        if isinstance(exception[1], KeyboardInterrupt):
            return
        try:
            if exception[1] is None:
                self.wait()
                if self._primary:
                    self._prune()
            else:
                with contextlib.suppress(CheckpointError):
                    self.wait()
        finally:
            self._orbax.close()

    def save(
        self,
        tree: Any,
        *,
        step: int,
        tokens: int,
        data: Mapping[str, Any],
        val_bpb: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy ``tree`` (arrays) to the host, return, and write it in the background.

        The arrays may be donated as soon as this returns. A save still running is waited for. A step that is already
        saved is left as it is.

        Raises:
            CheckpointError: this save or the one before failed; what was complete before still is.
        """
        self.wait()
        final, partial = self.folder / str(step), self.folder / f".{step}.partial"
        if final.exists():
            return
        arrays, _ = _flatten(tree)
        shapes = {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in arrays.items()}
        if val_bpb is not None and not math.isfinite(val_bpb):
            val_bpb = None
        info = {"step": step, "tokens": tokens, "val_bpb": val_bpb, "data": dict(data), "extra": dict(extra or {})}
        texts = self._texts | {"info.json": json.dumps(info, indent=1)}
        stored = {name: leaf for name, leaf in arrays.items() if leaf.size}
        try:
            if self._primary:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            cuts = {name: _save_args(leaf) for name, leaf in stored.items()}
            self._orbax.save(partial / "state", args=ocp.args.PyTreeSave(stored, save_args=cuts))
        except (OSError, ValueError) as error:
            raise self._failed(step, partial, error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(step, partial, final, texts, shapes), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Block until the save in the background is complete.

        Raises:
            CheckpointError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Raise the :class:`CheckpointError` of a save that failed in the background, once, without blocking."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _finish(self, step: int, partial: Path, final: Path, texts: dict[str, str], shapes: dict[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()
            if not self._primary:
                return
            if self._tokenizer is not None:
                shutil.copyfile(self._tokenizer, partial / "tokenizer.json")
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            write_manifest(partial, shapes)
            self._prune()
            partial.rename(final)
            _sync_folder(self.folder)
        except Exception as error:  # a thread's failure is raised by the caller's next call
            self._failure = self._failed(step, partial, error)

    def _failed(self, step: int, partial: Path, error: Exception) -> CheckpointError:
        if self._primary:
            _remove(partial)
        newest = newest_checkpoint(self.folder)
        kept = f"the newest complete one is {newest}" if newest else "there is no complete one yet"
        reason = _one_line(error)
        remedy = (
            "free space and run the same command again" if "No space left" in reason else "run the same command again"
        )
        return CheckpointError(f"checkpoint of step {step} could not be written ({reason}); {kept}; {remedy}")

    def _prune(self) -> None:
        found = list_checkpoints(self.folder)
        kept = {*found[-self.keep :], best_checkpoint(self.folder)}
        for path in found:
            if path not in kept:
                doomed = path.with_name(f".{path.name}.deleted")
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by name, such as ``params/trunk/norm/scale``, and the structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}, structure


def _save_args(leaf: Any) -> ocp.SaveArgs:
    """Cuts a large array so that a slice can be read without the rest of it."""
    if leaf.nbytes <= _CHUNK_BYTES:
        return ocp.SaveArgs()
    axes = stacked_axes(leaf.shape, leaf.dtype.itemsize, _CHUNK_BYTES)
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)


def _remove(folder: Path) -> None:
    """Delete a failed save, whose parallel writes may still make files for a moment after one of them has failed.

    What lands later than that stays hidden, and the next writer clears it away.
    """
    for _ in range(4):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _match(path: Path, stored: dict[str, Any], wanted: dict[str, Any], partial: bool) -> None:
    for name, leaf in wanted.items():
        if name not in stored:
            raise CheckpointError(f"checkpoint {path} has no array {name}: it was saved with another configuration")
        there = (tuple(stored[name]["shape"]), stored[name]["dtype"])
        if there != (tuple(leaf.shape), str(leaf.dtype)):
            raise CheckpointError(
                f"checkpoint {path} has {name} as {there[1]}{list(there[0])}, this configuration as "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
    for name in stored:
        if name not in wanted and not partial:
            raise CheckpointError(f"checkpoint {path} has an array {name} that this configuration does not")


def _score(path: Path) -> float | None:
    try:
        return read_info(path).val_bpb
    except CheckpointError:
        return None


def _fault(path: Path) -> tuple[str, dict[str, Any]]:
    """What is wrong with a checkpoint ('' if nothing), and its manifest."""
    if not path.is_dir():
        return "there is no such folder", {}
    try:
        manifest = _read_manifest(path)
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read ({_one_line(error)})", {}
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", {}
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes where {expected['bytes']} were written", {}
        if "crc32" in expected and _crc32(file) != expected["crc32"]:
            return f"{name} has changed since it was written", {}
    return "", manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    told = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    try:
        whole = all({"shape", "dtype"} <= array.keys() for array in told["arrays"].values())
        whole = whole and all("bytes" in file for file in told["files"].values())
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError("it does not list a checkpoint's arrays and files")
    return told


def _damaged(path: Path, fault: str) -> CheckpointError:
    others = [p for p in list_checkpoints(path.parent) if p.name != path.name]
    good = next((p for p in reversed(others) if not _fault(p)[0]), None)
    if good is not None:
        remedy = f"the newest good one is {good}; delete {path.name} (and any between) to go on from there"
    else:
        remedy = f"there is no other good one in {path.parent}; delete {path.name} to start from the beginning"
    return CheckpointError(f"checkpoint {path} is damaged: {fault}; {remedy}")


def _inventory(folder: Path) -> dict[str, dict[str, int]]:
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    sizes = {name: p.stat().st_size for name, p in files.items()}
    checked = sum(sizes.values()) <= _CHECKSUM_LIMIT
    return {name: {"bytes": sizes[name]} | ({"crc32": _crc32(p)} if checked else {}) for name, p in files.items()}


def _crc32(file: Path) -> int:
    total = 0
    with file.open("rb") as stream:
        for block in _blocks(stream):
            total = zlib.crc32(block, total)
    return total


def _blocks(stream: Any) -> Iterator[bytes]:
    while block := stream.read(2**20):
        yield block


def _write_synced(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(error: BaseException) -> str:
    """An exception's message without its nested paths: the operating system's own words where it has some."""
    text = " ".join(str(error).split()) or type(error).__name__
    code = text.rpartition("[os_error_code='")[2].partition("'")[0]
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return os.strerror(int(code)) if code.isdigit() else text[:200]


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs tracebacks of failures that it also raises; the one line raised here is enough."""
    return "orbax" not in record.pathname
