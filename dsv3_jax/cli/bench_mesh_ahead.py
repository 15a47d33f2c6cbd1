"""Programs of ``dsv3 bench mesh`` compiled beside each other, before the first row runs."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsv3_jax.cli.bench_mesh_row import COMMAND, spec_of
from dsv3_jax.train.mesh_rows import Row
from sharding.flags import apply_gpu_flags


def compile_rows(
    rows: Sequence[Row], environment: Mapping[str, str], compile_cache: str, *, at_once: int, gpus: int, end: float
) -> None:
    """Each row's program into the folder of compiled ones. One that cannot be compiled tells so when it is to run.

    Args:
        rows: what to compile.
        environment: of the processes.
        compile_cache: the folder, as the command line has it.
        at_once: processes at one time; each chooses its kernels on another GPU.
        gpus: of the machine.
        end: when to stop, by the monotonic clock.
    """
    waiting, running = list(rows), {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            while (waiting or running) and time.monotonic() < end:
                running = {place: one for place, one in running.items() if one.poll() is None}
                for place in set(range(at_once)) - set(running):
                    if waiting:
                        row = waiting.pop(0)
                        own = turned(environment, place % gpus, gpus)
                        apply_gpu_flags(own, row.devices, beside=row.config.mesh.sends_beside)
                        spec = Path(folder) / f"{row.name}.json"
                        spec.write_text(json.dumps(spec_of(row, None, compile_cache)), encoding="utf-8")
                        command = [*COMMAND, str(spec), str(spec.with_suffix(".result"))]
                        running[place] = subprocess.Popen(command, env=own, stdout=sys.stderr)
                time.sleep(0.2)
        finally:
            for one in running.values():
                if one.poll() is None:
                    one.kill()
                    one.wait()


def turned(environment: Mapping[str, str], first: int, count: int) -> dict[str, str]:
    """An environment in which a process that compiles sees GPU ``first`` of ``count`` before the others, and takes of
    their memory what it needs, not all."""
    given = environment.get("CUDA_VISIBLE_DEVICES", "")
    visible = [one for one in given.split(",") if one.strip()] or [str(i) for i in range(count)]
    changed = {
        "CUDA_VISIBLE_DEVICES": ",".join(visible[first:] + visible[:first]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    return dict(environment) | changed
