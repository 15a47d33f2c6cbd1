"""``dsv3 train PRESET --out DIR``: train, or go on with the run in DIR."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from dsv3_jax.cli.compile_cache import Kept, keep_compiled
from dsv3_jax.cli.overrides import parse_config
from dsv3_jax.config import ConfigError
from sharding.flags import apply_gpu_flags
from sharding.launch import Launch, LaunchError, joined, leave

_MISTAKE = 2


@dataclass(frozen=True)
class Options(Kept):
    """Options of ``dsv3 train``."""

    out: str = ""
    """Run folder, made if it is not there; a run that is already in it goes on from its newest checkpoint."""
    launch: Launch = field(default_factory=Launch)
    """The other processes of the run, where there are any."""


def run(argv: Sequence[str]) -> int:
    """Train; the exit status: 0 done, 1 a failure or a missed ``train.bigram_gate``, 130 interrupted after saving."""
    description = "Train from scratch, or go on with the run in DIR: the same command resumes it."
    config, options = parse_config("dsv3 train", argv, description, Options)
    if not options.out:
        raise ConfigError("--out is missing: name the run's folder, as in `dsv3 train tiny --out runs/tiny`")
    mesh = config.mesh
    apply_gpu_flags(os.environ, mesh.devices, beside=mesh.sends_beside)
    # JAX and all above it take seconds to import: mistakes on the command line are told before.
    from dsv3_jax.checkpoint import CheckpointError
    from dsv3_jax.train.trainer import FAILED, INTERRUPTED, RunError, train

    keep_compiled(options.compile_cache)
    try:
        status = train(config, options.out, launch=options.launch).status
        leave()
        return status
    except (CheckpointError, LaunchError, RunError) as error:
        if joined():
            _end_now(error, FAILED)
        print(f"dsv3: error: {error}", file=sys.stderr)
        return FAILED
    except ConfigError as error:
        if joined():
            _end_now(error, _MISTAKE)
        raise
    except KeyboardInterrupt:
        # Saving threads are not waited for: a checkpoint that is not complete is not visible.
        print("dsv3: stopped at once, nothing saved since the newest checkpoint", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


def _end_now(error: Exception, status: int) -> NoReturn:
    """The other processes are told; JAX's own end would wait for them in vain."""
    print(f"dsv3: error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
