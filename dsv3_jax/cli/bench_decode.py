"""``dsv3 bench decode PRESET``: the engine's tokens a second, with random weights."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsv3_jax.cli.compile_cache import Kept, keep_compiled
from dsv3_jax.cli.overrides import check_writable, parse_config
from dsv3_jax.config import ConfigError


@dataclass(frozen=True)
class Options(Kept):
    """Options of ``dsv3 bench decode``."""

    batch: int = 32
    """Sequences side by side."""
    prompt: int = 128
    """Tokens of each prompt."""
    new: int = 512
    """Tokens written behind each."""
    turns: int = 16
    """Tokens that each sequence writes in one call of the device."""
    drafts: int = 0
    """Tokens that the MTP module drafts; with random weights nearly none counts."""
    cache_dtype: Literal["same", "fp8"] = "same"
    """What latents are stored in."""
    form: Literal["naive", "absorbed"] = "absorbed"
    """How latent attention reads the cache."""
    json: str = ""
    """File that the figures are written to as one JSON object; '-' prints the object alone."""


def run(argv: Sequence[str]) -> int:
    """Measure; the exit status."""
    description = "Time the engine on random weights and prompts: prefill, decode, one sequence alone."
    config, options = parse_config("dsv3 bench decode", argv, description, Options)
    for name in ("batch", "prompt", "new", "turns"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} = {getattr(options, name)} must be at least 1")
    if options.json != "-":
        check_writable("--json", options.json)
    from dsv3_jax.inference import EngineOptions
    from dsv3_jax.inference.bench import bench_decode, random_model

    keep_compiled(options.compile_cache)
    dtype = "float32" if config.train.precision == "fp32" else "bfloat16"
    held = EngineOptions(turns=options.turns, drafts=options.drafts, cache_dtype=options.cache_dtype, form=options.form)
    result = bench_decode(
        random_model(config.model, dtype),
        batch=options.batch,
        prompt=options.prompt,
        new=options.new,
        options=held,
        dtype=dtype,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    figures = dataclasses.asdict(result)
    text = json.dumps(figures, indent=2)
    if options.json == "-":
        print(text)
        return 0
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    width = max(map(len, figures))
    for name, value in figures.items():
        told = f"{value:,.2f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<{width}}  {told}")
    return 0
