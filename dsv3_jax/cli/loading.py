"""What ``dsv3 serve`` and ``dsv3 chat`` share: a checkpoint's model in an engine."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from dsv3_jax.cli.compile_cache import Kept, keep_compiled
from dsv3_jax.config import ConfigError

if TYPE_CHECKING:
    from dsv3_jax.data.tokenizer import Tokenizer
    from dsv3_jax.inference import Engine


@dataclass(frozen=True)
class Loading(Kept):
    """Which weights, and how much the engine holds and computes at a time."""

    checkpoint: str
    """Hugging Face folder, run folder, or one checkpoint of it (RUN/checkpoints/STEP)."""
    step: int = -1
    """Checkpoint of that step; -1 is the newest."""
    weights: Literal["params", "ema", "best"] = "params"
    """As trained, their moving average, or those with the lowest validation."""
    precision: Literal["run", "fp32", "bf16", "fp8"] = "run"
    """Type of parameters, activations and cache; run is what the model was trained in (bf16 after fp8), fp32 for a
    Hugging Face folder; fp8 is bf16 with the weights that are stored in FP8 left so."""
    max_batch: int = 32
    """Sequences that run side by side."""
    max_tokens: int = 0
    """Tokens of the longest sequence, prompt included; 0 is what the model was made for."""
    cache_tokens: int = 0
    """Tokens that the cache holds, of all sequences together; 0 is max-batch of the longest."""
    cache_dtype: Literal["same", "fp8"] = "same"
    """What latents are stored in: the type of activations, or FP8."""
    drafts: int = 0
    """Tokens that the MTP module drafts and the model checks in one pass; 0 writes one at a time."""


class Loaded(NamedTuple):
    """Ready to write."""

    engine: "Engine"
    tokenizer: "Tokenizer"


def load(options: Loading) -> Loaded | None:
    """The engine of a checkpoint; None after telling that the checkpoint is damaged.

    Raises:
        ConfigError: there is no such checkpoint, it has no tokenizer, or options do not fit.
    """
    # JAX and all above it take seconds to import: mistakes on the command line are told before.
    from dsv3_jax.checkpoint import CheckpointError
    from dsv3_jax.inference import Engine, EngineOptions
    from dsv3_jax.interop.pretrained import from_pretrained

    keep_compiled(options.compile_cache)
    try:
        model, config, tokenizer = from_pretrained(
            options.checkpoint,
            dtype="fp32" if options.precision == "run" else options.precision,
            step=None if options.step == -1 else options.step,
            weights=options.weights,
        )
    except CheckpointError as error:
        print(f"dsv3: error: {error}", file=sys.stderr)
        return None
    if tokenizer is None:
        raise ConfigError(f"{options.checkpoint} has no tokenizer.json: put the model's own into it")
    precision = config.train.precision if options.precision == "run" else options.precision
    held = EngineOptions(
        max_batch=options.max_batch,
        max_tokens=options.max_tokens,
        cache_tokens=options.cache_tokens,
        drafts=options.drafts,
        cache_dtype=options.cache_dtype,
    )
    dtype = "float32" if precision == "fp32" else "bfloat16"
    return Loaded(Engine(model, tokenizer, held, dtype=dtype), tokenizer)
