"""``dsv3 convert SRC DST``: weights between Hugging Face folders, our checkpoints and PyTorch files."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsv3_jax.cli.main import DONE, FAILURE
from dsv3_jax.cli.overrides import parse_words
from dsv3_jax.config import ConfigError


@dataclass(frozen=True)
class Options:
    """Options of ``dsv3 convert``."""

    to: Literal["auto", "hf", "orbax", "torch"] = "auto"
    """Layout of the new folder: sharded safetensors, a checkpoint of ours, or files for torch.load. auto makes a
    checkpoint of a Hugging Face folder and a Hugging Face folder of a checkpoint."""
    dtype: Literal["keep", "fp32", "bf16", "fp8"] = "keep"
    """Type of the weights; keep changes no bit. fp8 is the release's: matrices in blocks of 128 x 128, the rest
    bf16."""
    step: int = -1
    """Of a run, the checkpoint of that step; -1 is the newest."""
    weights: Literal["params", "ema", "best"] = "params"
    """Of a run: as trained, their moving average, or those with the lowest validation."""
    verify: bool = False
    """Read every tensor, and the texts beside them, back and compare."""
    force: bool = False
    """Replace the weights that are at DST; a folder with anything else in it, or of a run, stays."""
    allow_pickle: bool = False
    """Read pytorch_model.bin where there are no safetensors. It is taken apart, and nothing in it is run."""
    buffer_mb: int = 256
    """Megabytes (2^20) for all that is on its way, whatever the size of the model."""
    threads: int = 0
    """Slices on their way at a time; 0 takes the cores. Never more than the buffer holds, about 100 MB each."""
    shard_gb: float = 5.0
    """Gigabytes (10^9) of one file of a Hugging Face folder."""


def run(argv: Sequence[str]) -> int:
    """Convert; the exit status."""
    told = "Weights from SRC (Hugging Face folder, run, checkpoint) as a new folder DST."
    words, options = parse_words("dsv3 convert", argv, told, Options, ("SRC", "DST"))
    for name in ("buffer_mb", "shard_gb"):
        if not 0 < getattr(options, name) <= 1e9:  # nan neither
            told = f"--{name.replace('_', '-')} = {getattr(options, name)}"
            raise ConfigError(f"{told} must be greater than 0 and at most 1e9")
    if options.threads < 0:
        raise ConfigError(f"--threads = {options.threads} must not be negative")
    # JAX takes seconds to import: mistakes on the command line are told before.
    from dsv3_jax.checkpoint import CheckpointError
    from dsv3_jax.interop.convert import convert

    began = time.perf_counter()
    with _Bars() as bars:
        try:
            report = convert(
                *words,
                to=options.to,
                dtype=options.dtype,
                step=None if options.step == -1 else options.step,
                weights=options.weights,
                allow_pickle=options.allow_pickle,
                verify=options.verify,
                force=options.force,
                buffer_bytes=options.buffer_mb * 2**20,
                threads=options.threads,
                shard_bytes=int(options.shard_gb * 1e9),
                progress=bars.show,
            )
        except CheckpointError as error:
            print(f"dsv3: error: {error}", file=sys.stderr)
            return FAILURE
        except KeyboardInterrupt:
            print("dsv3: stopped; the same command goes on from here", file=sys.stderr)
            raise
    seconds = time.perf_counter() - began
    new = report.nbytes - report.resumed_bytes
    print(
        f"{report.path}: {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB read in {seconds:.0f} s "
        f"({new / seconds / 1e6:.0f} MB/s){', read back and equal' if options.verify else ''}"
    )
    return DONE


class _Bars:
    """A bar for each phase with bytes, speed and time left; lines every few seconds where there is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        console = Console(stderr=True)
        self._terminal = sys.stderr.isatty()  # FORCE_COLOR, which notebooks set, makes no pipe a terminal
        self._tasks: dict[str, Any] = {}
        self._told = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not self._terminal)

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, phase: str, done: int, total: int) -> None:
        """Bytes done of a phase."""
        if self._terminal:
            if phase not in self._tasks:
                self._tasks[phase] = self._progress.add_task(phase, total=total)
            self._progress.update(self._tasks[phase], completed=done)
        elif time.monotonic() - self._told > 5:
            self._told = time.monotonic()
            print(f"{phase}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)
