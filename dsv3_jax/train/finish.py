"""What a run leaves when it ends: baselines to compare with, pictures, ``samples.txt``, ``summary.json``."""

import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from dsv3_jax.config import Config
from dsv3_jax.data import Data, consumed_counts, full_train_counts, gzip_bits_per_byte
from dsv3_jax.data.files import write_whole
from dsv3_jax.inference import generate_text
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.planning.parameters import count_parameters
from dsv3_jax.train.loss import activation_dtype
from dsv3_jax.train.plots import write_plots

_COUNTED_TOKENS = 200_000_000
"""Runs up to this many tokens are compared with a bigram model; longer ones only where ``train.bigram_gate`` asks."""

_SAMPLES, _TEMPERATURE, _TOP_P = 3, 0.7, 0.95
_MARK = "▮"
"""Stands between a prompt and what the model adds."""


def summarize(
    config: Config, out: Path, data: Data, model: DeepSeekV3 | None, facts: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Baselines, pictures, samples and ``summary.json``, all told on the console.

    Args:
        config: the run.
        out: its folder.
        data: its data.
        model: with its weights at the end; None leaves samples out.
        facts: ``val_bpb`` (bits per byte or None), ``steps``, ``tokens``, ``seconds``.
        console: where to print.

    Returns:
        ``facts`` with ``bigram_consumed_bpb``, ``bigram_full_bpb``, ``gzip_bpb`` (None where not measured),
        ``beats_bigram_consumed``, ``parameters`` and ``device``.
    """
    summary = dict(facts)
    summary |= _baselines(config, data, facts)
    reached, wanted = summary["val_bpb"], summary["bigram_consumed_bpb"]
    summary["beats_bigram_consumed"] = None if reached is None or wanted is None else reached < wanted
    summary["parameters"] = count_parameters(config.model).trainable
    summary["device"] = jax.devices()[0].device_kind
    lines = {
        "bigram over the tokens consumed": summary["bigram_consumed_bpb"],
        "bigram over the whole train split": summary["bigram_full_bpb"],
    }
    pictures = write_plots(out, router_names(config), lines)
    too_large = f"no samples: {out} is sampled by `dsv3 generate --checkpoint {out}` on a device that holds the model\n"
    samples = [too_large] if model is None else _samples(config, data, model)
    write_whole(out / "samples.txt", "\n".join(samples))
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    console.print(samples[0], highlight=False, markup=False, soft_wrap=True)
    _print(summary, out, pictures, console)
    return summary


def router_names(config: Config) -> list[str]:
    """A name for each router, in the order of the recorded expert loads."""
    model = config.model
    if not model.n_routed_experts:
        return []
    trunk = [f"layer {i}" for i in range(model.n_dense_layers, model.num_hidden_layers)]
    return trunk + [f"MTP {k}" for k in range(1, model.num_nextn_predict_layers + 1)]


def _baselines(config: Config, data: Data, facts: dict[str, Any]) -> dict[str, float | None]:
    names = ("bigram_consumed_bpb", "bigram_full_bpb", "gzip_bpb")
    rows = data.validation_rows
    wanted = config.train.bigram_gate or facts["tokens"] <= _COUNTED_TOKENS
    if not len(rows) or not wanted:
        return dict.fromkeys(names)
    # The stream is played again from its start: what the run consumed, however often it was interrupted.
    consumed = consumed_counts(data, facts["tokens"] // config.train.seq_len)
    values = (
        consumed.bits_per_byte(rows, data.tokenizer),
        full_train_counts(data).bits_per_byte(rows, data.tokenizer),
        gzip_bits_per_byte(rows, data.tokenizer),
    )
    return dict(zip(names, values, strict=True))


def _samples(config: Config, data: Data, model: DeepSeekV3) -> list[str]:
    """The model going on from the beginnings of validation rows, and writing a document of its own."""
    tokenizer, length = data.tokenizer, config.train.seq_len
    begun = length // 4
    prompts = [tokenizer.decode(row[:begun]) for row in data.validation_rows[:_SAMPLES]] + [""]
    written = generate_text(
        model,
        tokenizer,
        prompts,
        max_new_tokens=length - begun,
        parse_special=True,
        temperature=_TEMPERATURE,
        top_p=_TOP_P,
        seed=config.train.seed,
        dtype=activation_dtype(config.train.precision),
    )
    shown = []
    for number, (prompt, text) in enumerate(zip(prompts, written, strict=True), start=1):
        told = f"prompt of {begun} tokens from the validation split" if prompt else "no prompt"
        title = f"=== sample {number}: {told}, temperature {_TEMPERATURE}, top-p {_TOP_P} ==="
        shown.append(f"{title}\n{prompt}{_MARK if prompt else ''}{text}\n")
    return shown


def _print(summary: dict[str, Any], out: Path, pictures: list[Path], console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say(
        f"{summary['steps']} steps, {summary['tokens']:,} tokens, {summary['parameters']:,} parameters, "
        f"{summary['seconds']:.0f} s on {summary['device']}"
    )
    reached = summary["val_bpb"]
    if reached is not None:
        say(f"validation: {reached:.4f} bits per byte")
        for name, key in (
            ("bigram over the tokens consumed", "bigram_consumed_bpb"),
            ("bigram over the whole train split", "bigram_full_bpb"),
            ("gzip -9", "gzip_bpb"),
        ):
            if summary[key] is not None:
                verdict = "beaten" if reached < summary[key] else "NOT beaten"
                say(f"  {name}: {summary[key]:.4f} ({verdict})")
    say(f"pictures: {', '.join(str(path) for path in pictures)}")
    say(f"samples: {out / 'samples.txt'}")
    say(f"summary: {out / 'summary.json'}")
