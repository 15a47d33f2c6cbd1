"""``dsv3 generate --checkpoint PATH``: text from a trained model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsv3_jax.cli.compile_cache import Kept, keep_compiled
from dsv3_jax.cli.main import DONE, FAILURE
from dsv3_jax.cli.overrides import parse_options
from dsv3_jax.config import ConfigError


@dataclass(frozen=True)
class Options(Kept):
    """Options of ``dsv3 generate``."""

    checkpoint: str
    """Hugging Face folder, run folder, or one checkpoint of it (RUN/checkpoints/STEP)."""
    prompt: str = ""
    """Text to go on from; give it again for more texts, written side by side. Without it standard input is read. An
    empty text starts a new document."""
    max_new_tokens: int = 128
    """Tokens added to each prompt at most."""
    temperature: float = 0.0
    """0 takes the best token each time; 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Share of the probability that is drawn from."""
    seed: int = 0
    """The same seed draws the same text."""
    form: Literal["naive", "absorbed"] = "absorbed"
    """How latent attention reads its cache; both give the same text."""
    step: int = -1
    """Checkpoint of that step; -1 is the newest."""
    weights: Literal["params", "ema", "best"] = "params"
    """As trained, their moving average, or those with the lowest validation."""
    precision: Literal["run", "fp32", "bf16"] = "run"
    """Type of activations and cache; run is what the model was trained in (bf16 after fp8), fp32 for a Hugging Face
    folder."""
    parse_special: bool = False
    """Special tokens spelled in prompts count as such."""


def run(argv: Sequence[str]) -> int:
    """Print each prompt with what the model adds to it; the exit status."""
    prompts, rest = _take_prompts(argv)
    options = parse_options("dsv3 generate", rest, "Text from a trained model, prompt included.", Options)
    prompts = [_checked(text) for text in prompts]
    if not prompts and sys.stdin is None:
        raise ConfigError("standard input is closed: give the text with --prompt")
    # JAX and all above it take seconds to import: mistakes on the command line are told before.
    from dsv3_jax.checkpoint import CheckpointError
    from dsv3_jax.inference import generate_text
    from dsv3_jax.interop.pretrained import from_pretrained

    keep_compiled(options.compile_cache)
    try:
        model, config, tokenizer = from_pretrained(
            options.checkpoint, step=None if options.step == -1 else options.step, weights=options.weights
        )
    except CheckpointError as error:
        print(f"dsv3: error: {error}", file=sys.stderr)
        return FAILURE
    if tokenizer is None:
        raise ConfigError(f"{options.checkpoint} has no tokenizer.json: put the model's own into it")
    prompts = prompts or [_read_stdin()]
    precision = config.train.precision if options.precision == "run" else options.precision
    written = generate_text(
        model,
        tokenizer,
        prompts,
        max_new_tokens=options.max_new_tokens,
        parse_special=options.parse_special,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        form=options.form,
        dtype="float32" if precision == "fp32" else "bfloat16",
    )
    for number, (prompt, new) in enumerate(zip(prompts, written, strict=True)):
        if len(prompts) > 1:
            print(f"--- {number} ---")
        print(prompt + new)
    return DONE


def _take_prompts(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every ``--prompt``, of which an option knows but the last, and the other words."""
    prompts, rest, words = [], [], list(argv)
    while words:
        name, has_value, text = (word := words.pop(0)).partition("=")
        if name == "--prompt" and (has_value or (words and not words[0].startswith("--"))):
            prompts.append(text if has_value else words.pop(0))
        else:
            rest.append(word)
    return prompts, rest


def _read_stdin() -> str:
    """All of standard input, without the line break that ends it."""
    if sys.stdin.isatty():
        print("dsv3: type the text to go on from, then Ctrl-D", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError("standard input is not UTF-8 text: give the text with --prompt") from error


def _checked(prompt: str) -> str:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError("--prompt is not UTF-8 text") from error
    return prompt
