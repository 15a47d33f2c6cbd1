"""``dsv3 train PRESET --out DIR``: train, or go on with the run in DIR."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_jax.cli.overrides import parse_config
from dsv3_jax.config import ConfigError


@dataclass(frozen=True)
class Options:
    """Options of ``dsv3 train``."""

    out: str = ""
    """Run folder, made if it is not there; a run that is already in it goes on from its newest checkpoint."""


def run(argv: Sequence[str]) -> int:
    """Train; the exit status: 0 done, 1 a failure or a missed ``train.bigram_gate``, 130 interrupted after saving."""
    description = "Train from scratch, or go on with the run in DIR: the same command resumes it."
    config, options = parse_config("dsv3 train", argv, description, Options)
    if not options.out:
        raise ConfigError("--out is missing: name the run's folder, as in `dsv3 train tiny --out runs/tiny`")
    # JAX and all above it take seconds to import: mistakes on the command line are told before.
    from dsv3_jax.checkpoint import CheckpointError
    from dsv3_jax.train.trainer import FAILED, INTERRUPTED, RunError, train

    try:
        return train(config, options.out).status
    except (CheckpointError, RunError) as error:
        print(f"dsv3: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        # Saving threads are not waited for: a checkpoint that is not complete is not visible.
        print("dsv3: stopped at once, nothing saved since the newest checkpoint", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
