"""How fast and in how much memory ``dsv3 convert`` moves a checkpoint too large for either:
``python -m dsv3_jax.interop.bench FOLDER``.

A folder of V3's layer shapes with fewer layers is written with random numbers, copied plainly, and converted both ways
by the command a user would type, each in a process of its own whose peak memory the kernel tells.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsv3_jax.config import ModelConfig, load_config
from dsv3_jax.interop.block_fp8 import E4M3
from dsv3_jax.interop.hf_config import WeightsDtype, to_hf
from dsv3_jax.interop.names import tensors
from dsv3_jax.interop.safetensors_file import ShardWriter
from dsv3_jax.interop.shard_plan import ShardPlan
from dsv3_jax.interop.sink import file_entries
from dsv3_jax.interop.source import F32

_SLICE = 2**23


def synthesize(folder: Path, model: ModelConfig, dtype: WeightsDtype) -> int:
    """Write a Hugging Face folder of random finite numbers; its bytes."""
    plan = ShardPlan(file_entries(tensors(model), lambda tensor: F32, dtype))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 0x78, _SLICE + 2**16, np.uint8) | (rng.integers(0, 2, _SLICE + 2**16, np.uint8) << 7)
    normal = rng.standard_normal(_SLICE + 2**16, np.float32)
    with ShardWriter(folder, plan) as writer:
        for name, entry in plan.tensors.items():
            width = entry.row_bytes // entry.dtype.itemsize
            step = max(1, _SLICE // width)
            pool = codes.view(E4M3) if entry.dtype == E4M3 else normal.astype(entry.dtype)
            for start in range(0, entry.rows, step):
                rows = min(step, entry.rows - start)
                first = int(rng.integers(2**16))
                values = pool[first : first + rows * width].reshape(rows, *entry.shape[1:])
                writer.write_rows(name, start, np.abs(values) + entry.dtype.type(1) if "scale_inv" in name else values)
    (folder / "config.json").write_text(json.dumps(to_hf(model, dtype)))
    return plan.total_size


@dataclasses.dataclass(frozen=True)
class Measured:
    """One process."""

    what: str
    seconds: float
    peak_gb: float
    mb_per_s: float


def measure(what: str, command: Sequence[str], nbytes: int, kill_after: float = 0.0) -> Measured:
    """Run a command from a cold page cache; ``kill_after`` seconds it is killed."""
    _drop_caches()
    began = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _peak_bytes(process.pid))
        if kill_after and time.perf_counter() - began > kill_after:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    if process.returncode and not kill_after:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    row = Measured(what, seconds, peak / 1e9, nbytes / seconds / 1e6)
    print(f"{row.what:<44} {row.seconds:7.1f} s {row.mb_per_s:7.0f} MB/s  peak {row.peak_gb:.2f} GB", flush=True)
    return row


def _peak_bytes(process: int) -> int:
    """The most that a process has had resident, by the kernel."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _drop_caches() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        print("(the page cache cannot be dropped here: reads may be warm)", flush=True)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder on the disk to be measured; needs three times the size")
    parser.add_argument("--dense", type=int, default=1, help="dense layers")
    parser.add_argument("--moe", type=int, default=1, help="mixture-of-experts layers, 11.5 GB each in FP8")
    parser.add_argument("--dtype", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--buffer-mb", default="256")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layers = {"num_hidden_layers": options.dense + options.moe, "first_k_dense_replace": options.dense}
    v3 = load_config("deepseek_v3", model_only=True).model
    model = dataclasses.replace(v3, **layers, num_nextn_predict_layers=0)
    options.folder.mkdir(parents=True)
    source, copied, arrays, back = (options.folder / name for name in ("hf", "copied", "orbax", "back"))
    nbytes = synthesize(source, model, options.dtype)
    print(f"{nbytes / 1e9:.2f} GB of {options.dtype}, {len(tensors(model))} tensors", flush=True)
    convert = [sys.executable, "-m", "dsv3_jax.cli.main", "convert", "--buffer-mb", options.buffer_mb]
    rows = [measure("cp -r", ["cp", "-r", str(source), str(copied)], nbytes)]
    shutil.rmtree(copied)
    rows.append(measure("convert to Orbax", [*convert, str(source), str(arrays)], nbytes))
    half = rows[-1].seconds / 2
    shutil.rmtree(arrays)
    rows.append(measure("the same, killed half way", [*convert, str(source), str(arrays)], nbytes, half))
    rows.append(measure("and gone on with", [*convert, str(source), str(arrays)], nbytes))
    rows.append(measure("convert back", [*convert, str(arrays), str(back)], nbytes))
    same = all((back / p.name).read_bytes() == p.read_bytes() for p in source.glob("*.json") if "index" in p.name)
    compared = subprocess.run(["diff", "-rq", "--exclude=*.json", source, back], capture_output=True, text=True)
    print(f"files equal to the first: {not compared.stdout and same} {compared.stdout}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
