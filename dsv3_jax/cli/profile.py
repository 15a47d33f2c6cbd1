"""``dsv3 profile PRESET --out DIR``: a trace of a few training steps to look at, and where their time goes."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.cli.compile_cache import Kept, keep_compiled
from dsv3_jax.cli.overrides import parse_config
from dsv3_jax.config import ConfigError
from sharding.flags import apply_gpu_flags


@dataclass(frozen=True)
class Options(Kept):
    """Options of ``dsv3 profile``."""

    out: str = ""
    """Folder that the trace is written to."""
    steps: int = 3
    """Steps that are recorded, after two more."""


def run(argv: Sequence[str]) -> int:
    """Write the trace; the exit status."""
    description = (
        "Record training steps on random tokens with JAX's profiler: a trace for xprof or Perfetto, and the table of "
        "where a step goes."
    )
    config, options = parse_config("dsv3 profile", argv, description, Options)
    if not options.out:
        raise ConfigError("--out is missing: name the trace's folder, as in `dsv3 profile tiny --out traces/tiny`")
    if options.steps < 1:
        raise ConfigError(f"--steps = {options.steps} must be at least 1")
    mesh = config.mesh
    apply_gpu_flags(os.environ, mesh.devices, beside=mesh.sends_beside)
    import jax

    from dsv3_jax.train.profile import how_to_open, profile_run
    from dsv3_jax.train.step import out_of_memory
    from dsv3_jax.train.step_table import as_text

    keep_compiled(options.compile_cache)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = profile_run(
            config, folder, steps=options.steps, say=lambda line: print(line, file=sys.stderr, flush=True)
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"dsv3: error: {out_of_memory(config)}", file=sys.stderr)
        return 1
    print(as_text(found.rows))
    print(f"\n{found.step_ms:,.1f} ms a step by the host's clock, under the profiler")
    print(how_to_open(found.trace))
    return 0
