"""``convert``: weights from one layout to another, streamed through a fixed buffer, resumable, checked."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.checkpoint import write_manifest
from dsv3_jax.config import ConfigError, ModelConfig, to_toml
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.interop.block_fp8 import BF16, E4M3
from dsv3_jax.interop.checkpoint_choice import Weights
from dsv3_jax.interop.destination import MANIFEST, check_apart, check_destination
from dsv3_jax.interop.folder_files import tokenizer_texts, write_texts
from dsv3_jax.interop.hf_config import WeightsDtype, to_hf
from dsv3_jax.interop.names import leaf_shapes, scale_leaf_shapes
from dsv3_jax.interop.opened import Opened, kind_of, open_weights
from dsv3_jax.interop.safetensors_file import HFFolder, ShardWriter
from dsv3_jax.interop.shard_plan import MAX_SHARD_BYTES, ShardPlan
from dsv3_jax.interop.sink import (
    ArraySink,
    Dtype,
    FileSink,
    Sink,
    array_dtypes,
    array_layout,
    file_entries,
    stored_dtype,
)
from dsv3_jax.interop.source import HFSource, OrbaxSource, Source
from dsv3_jax.interop.torch_file import TorchFolder, TorchPlan, TorchWriter
from dsv3_jax.interop.transfer import (
    Journal,
    Progress,
    Unit,
    checksums,
    compare,
    plan_units,
    slices_at_a_time,
    transfer,
)
from dsv3_jax.orbax_store import ArraysReader, ArraysWriter

Layout = Literal["hf", "orbax", "torch"]
Phase = Literal["convert", "verify"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a conversion is done: the arguments of :func:`convert` that say so."""

    to: Layout
    dtype: Dtype = "keep"
    buffer_bytes: int = 256 * 2**20
    threads: int = 0
    shard_bytes: int = MAX_SHARD_BYTES
    verify: bool = False
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did."""

    path: Path
    tensors: int
    nbytes: int
    """Bytes of the source that travelled."""
    resumed_bytes: int
    """Of these, the bytes that an earlier call had already brought over."""


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Layout | Literal["auto"] = "auto",
    dtype: Dtype = "keep",
    step: int | None = None,
    weights: Weights = "params",
    allow_pickle: bool = False,
    verify: bool = False,
    force: bool = False,
    buffer_bytes: int = 256 * 2**20,
    threads: int = 0,
    shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[Phase, int, int], None] = lambda phase, done, total: None,
) -> Report:
    """Write the weights of ``src`` as a new folder ``dst``.

    Memory is ``buffer_bytes`` beside what Python and JAX need, whatever the size of the model or of a tensor.
    The folder is made under a hidden name beside ``dst`` and renamed when it is complete; a conversion that was
    stopped goes on when the same call is made again.

    Args:
        src: Hugging Face folder, run folder of ``dsv3 train``, or one checkpoint of it.
        dst: the new folder.
        to: ``hf`` sharded safetensors, ``orbax`` a checkpoint of ours, ``torch`` files for ``torch.load``; ``auto``
            makes a checkpoint of a Hugging Face folder and a Hugging Face folder of a checkpoint.
        dtype: ``keep`` changes no bit; ``fp8`` is the release's: matrices of FP8 Linears in blocks of 128 x 128, the
            rest in bfloat16.
        step: of a run, the checkpoint; None is the newest.
        weights: of a run, which copy of the weights.
        allow_pickle: read PyTorch's files (nothing in them is run).
        verify: read everything back and compare.
        force: replace the weights that are at ``dst``; a folder with anything else in it, or of a run, stays.
        buffer_bytes: memory for all slices on their way.
        threads: slices at a time, never more than the buffer holds; 0 takes the cores.
        shard_bytes: largest file of a Hugging Face folder; a tensor is never split.
        progress: called with the phase, the bytes done and the bytes in all.

    Raises:
        ConfigError: a folder that is not there or may not be replaced, ``dst`` that is or holds ``src``, or an
            architecture without a published layout.
        WeightsError: tensors that are missing, unexpected or damaged; tensors or texts that are read back different.
    """
    source, final = Path(src), Path(dst)
    check_apart(source, final)
    check_destination(final, force)
    if to == "auto":
        to = "orbax" if kind_of(source) == "hf" else "hf"
    options = Options(to, dtype, buffer_bytes, threads, shard_bytes, verify, force)
    opening = open_weights(source, step=step, weights=weights, allow_pickle=allow_pickle, cache_bytes=buffer_bytes // 4)
    with opening as opened:
        return write_weights(opened, final, options, progress)


def write_weights(opened: Opened, final: Path, options: Options, progress: Callable[[Phase, int, int], None]) -> Report:
    """The second half of :func:`convert`, for weights that are open."""
    threads = slices_at_a_time(options.buffer_bytes, options.threads or os.cpu_count() or 1)
    partial = final.with_name(f".{final.name}.converting")
    prints = _fingerprint(opened, options)
    resumed = _enter(partial, prints)
    try:
        target = _Target.make(partial, opened, options, resumed)
        units = plan_units(
            opened.tensors,
            opened.source,
            chunk_rows=target.chunk_rows or opened.chunk_rows,
            whole_chunks=bool(target.chunk_rows),
        )
        journal = Journal(partial / _JOURNAL)
        before = sum(units[number].nbytes for number in journal.done)
        try:
            transfer(units, opened.source, target.sink, journal, threads=threads, progress=_of("convert", progress))
        finally:
            journal.close()
        target.finish()
        if options.verify:
            with target.read_back() as written:
                compare(units, opened.source, target.sink, written, threads=threads, progress=_of("verify", progress))
    except OSError as error:
        if error.errno is None:
            raise
        raise ConfigError(f"{partial} cannot be written ({os.strerror(error.errno)}); run again to go on") from error
    _finish(partial, final, opened, options, units, journal)
    return Report(final, len(opened.tensors), sum(unit.nbytes for unit in units), before)


_JOURNAL = "journal.txt"
_PRINT = "fingerprint.txt"


def _of(phase: Phase, progress: Callable[[Phase, int, int], None]) -> Progress:
    return lambda done, total: progress(phase, done, total)


def _fingerprint(opened: Opened, options: Options) -> str:
    """Of everything that decides what is written where: an interrupted conversion goes on only under the same."""
    told = [
        opened.identity,
        [[t.name, *t.shape] for t in opened.tensors],
        dataclasses.asdict(dataclasses.replace(options, buffer_bytes=0, threads=0, verify=False, force=False)),
        to_toml(opened.config),
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _enter(partial: Path, prints: str) -> bool:
    """Make the hidden folder, or enter the one that a stopped conversion left; whether it goes on."""
    mark = partial / _PRINT
    if mark.is_file() and mark.read_text(encoding="ascii") == prints:
        return True
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    mark.write_text(prints, encoding="ascii")
    return False


@dataclasses.dataclass
class _Target:
    """The new folder while it is written."""

    sink: Sink
    finish: Callable[[], None]
    """Completes the weights' files."""
    read_back: Callable[[], contextlib.AbstractContextManager[Source]]
    chunk_rows: dict[str, int]

    @staticmethod
    def make(partial: Path, opened: Opened, options: Options, resumed: bool) -> "_Target":
        make = _arrays_target if options.to == "orbax" else _files_target
        return make(partial, opened, options, resumed)


def _files_target(partial: Path, opened: Opened, options: Options, resumed: bool) -> _Target:
    torch = options.to == "torch"
    entries = file_entries(opened.tensors, opened.source.dtype, options.dtype)
    if torch:
        file = TorchWriter(partial, TorchPlan(entries, options.shard_bytes), resume=resumed)
    else:
        file = ShardWriter(partial, ShardPlan(entries, options.shard_bytes), resume=resumed)

    @contextlib.contextmanager
    def read_back() -> Iterator[Source]:
        with (TorchFolder if torch else HFFolder)(partial) as folder:
            yield HFSource(folder, opened.tensors, opened.model)

    return _Target(FileSink(file, opened.source.dtype, options.dtype), file.close, read_back, {})


def _arrays_target(partial: Path, opened: Opened, options: Options, resumed: bool) -> _Target:
    state = partial / "checkpoints" / str(opened.step) / "state"
    model = opened.model
    shapes = leaf_shapes(model)
    dtypes = array_dtypes(opened.tensors, opened.source.dtype, options.dtype)
    layout = array_layout(opened.tensors, dtypes, shapes, scale_leaf_shapes(model))
    state.parent.mkdir(parents=True, exist_ok=True)
    threads = slices_at_a_time(options.buffer_bytes, options.threads or os.cpu_count() or 1)
    arrays = ArraysWriter(state, layout, resume=resumed and state.exists(), threads=threads)
    chunk_rows = {t.leaf: layout[t.leaf][2][-1 if t.transposed else len(t.index)] for t in opened.tensors}

    @contextlib.contextmanager
    def read_back() -> Iterator[Source]:
        yield OrbaxSource(ArraysReader(state, cache_bytes=options.buffer_bytes // 4), shapes)

    return _Target(ArraySink(arrays, dtypes), arrays.finish, read_back, chunk_rows)


def stored_as(opened: Opened, dtype: Dtype) -> WeightsDtype:
    """What ``config.json`` says of the type."""
    kinds = {stored_dtype(t, opened.source.dtype(t), dtype) for t in opened.tensors if not t.float32}
    return "fp8" if E4M3 in kinds else "bf16" if kinds == {BF16} else "fp32"


def _finish(
    partial: Path, final: Path, opened: Opened, options: Options, units: Sequence[Unit], journal: Journal
) -> None:
    check_destination(final, options.force)  # again: hours may have passed
    write = functools.partial(write_texts, verify=options.verify)
    texts = dict(opened.texts)
    told = {
        "dtype": options.dtype,
        "layout": options.to,
        "step": opened.step,
        "tensors": checksums(units, journal),
    }
    if options.to == "orbax":
        folder = partial / "checkpoints" / str(opened.step)
        info = {"step": opened.step, "tokens": opened.tokens, "val_bpb": None, "data": {}, "extra": {}}
        write(folder, texts | {"info.json": json.dumps(info), "config.toml": to_toml(opened.config)})
        write(partial, {"config.toml": to_toml(opened.config)})
        write_manifest(folder, _array_entries(folder / "state"))
    else:
        stored = stored_as(opened, options.dtype)
        texts |= hf_texts(opened.model, stored, texts)
        write(partial, texts)
    write(partial, {MANIFEST: json.dumps(told)})
    for name in (_JOURNAL, _PRINT):
        (partial / name).unlink()
    _sync(partial)
    doomed = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(doomed)
    partial.rename(final)
    shutil.rmtree(doomed, ignore_errors=True)


def _array_entries(state: Path) -> dict[str, Any]:
    arrays = ArraysReader(state).arrays
    return {name: {"shape": list(shape), "dtype": str(dtype)} for name, (shape, dtype) in arrays.items()}


def hf_texts(model: ModelConfig, dtype: WeightsDtype, carried: dict[str, str]) -> dict[str, str]:
    """``config.json`` and, where the source had none, ``generation_config.json``."""
    made = {"config.json": json.dumps(to_hf(model, dtype), indent=2) + "\n"}
    if "tokenizer.json" in carried and "tokenizer_config.json" not in carried:
        made |= tokenizer_texts(Tokenizer(carried["tokenizer.json"]), model.max_position_embeddings)
    if "generation_config.json" not in carried:
        ids = {"bos_token_id": model.bos_token_id, "eos_token_id": model.eos_token_id}
        made["generation_config.json"] = json.dumps({"_from_model_config": True} | ids, indent=2) + "\n"
    return made


def _sync(folder: Path) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
