"""``dsv3 info PRESET``: what a model is made of and what a token costs, in closed form."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_jax.cli.overrides import parse_config
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.planning import cache_bytes_per_token, count_parameters, flops_per_token


@dataclass(frozen=True)
class Options:
    """Options of ``dsv3 info``."""

    json: bool = False
    """Print one JSON object, for programs."""
    seq_len: int = 4096
    """Tokens a sequence for the attention part of FLOPs per token."""


def run(argv: Sequence[str]) -> int:
    """Print parameters by component, FLOPs per token and cache bytes per token; the exit status."""
    description = "Exact parameters by component, training FLOPs and cache bytes per token. Nothing is allocated."
    config, options = parse_config("dsv3 info", argv, description, Options, model_only=True)
    if options.seq_len < 1:
        raise ConfigError(f"--seq-len = {options.seq_len} must be greater than 0")
    facts = describe(config, options.seq_len)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_table(facts)
    return 0


def describe(config: Config, seq_len: int) -> dict[str, Any]:
    """The facts that ``--json`` prints.

    ``parameters_total`` and ``parameters_active`` are of the main model without MTP, router biases counted;
    ``components`` sum to ``parameters_total``. FLOPs are spec 2.4's, causal; the cache is in BF16.
    """
    counts = count_parameters(config.model)
    return {
        "name": config.name,
        "parameters_total": counts.total,
        "parameters_active": counts.active,
        "parameters_active_no_embedding": counts.active_no_embedding,
        "parameters_trainable": counts.trainable,
        "parameters_mtp": counts.mtp,
        "components": counts.components,
        "seq_len": seq_len,
        "flops_per_token": flops_per_token(config.model, seq_len),
        "cache_bytes_per_token": cache_bytes_per_token(config.model),
    }


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    total = facts["parameters_total"]
    # As Text: square brackets of a name are no markup.
    table = Table(title=Text(facts["name"], "table.title"), title_justify="left")
    for heading in ("parameters", "number", "share"):
        table.add_column(heading, justify="left" if heading == "parameters" else "right")
    for name, count in facts["components"].items():
        if count:
            table.add_row(name.replace("_", " "), f"{count:,}", f"{100 * count / total:.2f} %")
    table.add_section()
    for label, key in (
        ("total, without MTP", "parameters_total"),
        ("active a token", "parameters_active"),
        ("active, without the input table", "parameters_active_no_embedding"),
        ("MTP modules", "parameters_mtp"),
        ("trainable, with MTP", "parameters_trainable"),
    ):
        table.add_row(label, f"{facts[key]:,}", f"{100 * facts[key] / total:.2f} %")
    console = Console()
    console.print(table)
    gflop = facts["flops_per_token"] / 1e9
    console.print(f"training FLOPs a token, causal, T {facts['seq_len']}: {gflop:,.3f} GFLOP", highlight=False)
    console.print(f"cache a token, BF16: {facts['cache_bytes_per_token']:,} bytes", highlight=False)
