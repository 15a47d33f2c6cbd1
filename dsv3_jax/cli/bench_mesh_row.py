"""One row of ``dsv3 bench mesh``, in a process of its own: ``python -m dsv3_jax.cli.bench_mesh_row SPEC RESULT``.

A process for each row, because the allocator's peak never falls within a process, because memory that a row has run out
of or broken into pieces is whole for the next, and because a row that hangs can be ended. Its environment has the flags
of :mod:`sharding.flags` already.
"""

import dataclasses
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.cli.compile_cache import keep_compiled
from dsv3_jax.config import ConfigError, load_config, to_toml
from dsv3_jax.train.mesh_bench import Amount, compile_row, measure
from dsv3_jax.train.mesh_rows import Row
from dsv3_jax.train.step import out_of_memory

COMMAND = (sys.executable, "-m", "dsv3_jax.cli.bench_mesh_row")
"""Begin of the command line, before the two files."""


def spec_of(row: Row, amount: Amount | None, compile_cache: str) -> dict[str, Any]:
    """What :func:`main` reads; without an amount the row is compiled and not run."""
    facts = {"name": row.name, "trials": row.trials, "config": to_toml(row.config), "compile_cache": compile_cache}
    return facts | {"amount": dataclasses.asdict(amount) if amount else None}


def row_of(spec: Mapping[str, Any]) -> Row:
    """The row of a :func:`spec_of`."""
    return Row(spec["name"], load_config(tomllib.loads(spec["config"])), tuple(spec["trials"]))


def main(arguments: list[str]) -> int:
    """Measures the row of a file and writes its facts to another as it goes, ``failed`` among them where it cannot."""
    spec, result = json.loads(Path(arguments[0]).read_text(encoding="utf-8")), Path(arguments[1])
    facts: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        facts.update(found)
        half = result.with_suffix(".part")
        half.write_text(json.dumps(facts), encoding="utf-8")
        half.replace(result)

    def say(line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    row = row_of(spec)
    keep_compiled(spec["compile_cache"])
    try:
        if spec["amount"] is None:
            keep({"compile_seconds": compile_row(row)})
            return 0
        measure(row, Amount(**spec["amount"]), say=say, keep=keep)
    except ConfigError as error:
        keep({"failed": str(error)})
    except jax.errors.JaxRuntimeError as error:
        too_small = "RESOURCE_EXHAUSTED" in str(error)
        keep({"failed": out_of_memory(row.config) if too_small else " ".join(str(error).split())[:300]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
