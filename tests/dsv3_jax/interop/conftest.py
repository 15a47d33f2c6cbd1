"""Fixtures that ask torch and transformers. Without them tests skip and say so; where CI=true they fail instead."""

import fcntl
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dsv3_jax.interop import answers
from tests.dsv3_jax.interop.families import FAMILIES, PUBLISHED_STYLE


@pytest.fixture(scope="session")
def oracle():
    """``ask(jobs)``, see answers.py."""
    reason = answers.why_absent()
    if reason:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason} (CI=true: comparisons with transformers are never skipped)", pytrace=False)
        warnings.warn(f"NOT COMPARED with transformers: {reason}", stacklevel=1)
        pytest.skip(reason)
    return answers.ask


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """``(name, make) -> folder`` that ``make(folder)`` filled: once for all of xdist's workers.

    The folder is shared: tests must not change it.
    """
    base = tmp_path_factory.getbasetemp()

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        shared.mkdir(exist_ok=True)
        with Path(shared, "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / "made").exists():
                make(shared)
                (shared / "made").touch()
        return shared

    return folder


@pytest.fixture(scope="session")
def hf_families(oracle, made_once) -> dict[str, answers.Family]:
    """Every family's folder as transformers wrote it, with its answers."""

    def within(shared: Path) -> dict[str, answers.Family]:
        return {
            name: answers.Family(name, config, shared / name, shared / f"{name}.npz", shared / f"{name}.again.npz")
            for name, config in FAMILIES.items()
        }

    def make(shared: Path) -> None:
        jobs = [job for seed, family in enumerate(within(shared).values()) for job in _jobs(family, seed)]
        oracle([*jobs, {"do": "safetensors_dump", "folder": shared / "v3", "out": shared / "v3.dump.npz"}])

    return within(made_once("hf_families", make))


def _jobs(family: answers.Family, seed: int) -> list[dict]:
    make = {"do": "make", "config": family.config, "seed": seed, "folder": family.folder, "out": family.answers_file}
    make["published"] = family.name in PUBLISHED_STYLE
    read = {"do": "read", "folder": family.folder, "tokens": family.answers_file, "out": family.again_file}
    return [make, read]


@pytest.fixture(scope="session")
def ragged_config():
    """Of folders.RAGGED."""
    from dsv3_jax.config import load_config
    from tests.dsv3_jax.interop.folders import RAGGED

    return load_config({"name": "ragged", "model": RAGGED})


@pytest.fixture(scope="session")
def ragged(made_once, ragged_config, tokenizer):
    """Folder of one random model written as ``fp32``, ``bf16`` and ``fp8``; shared, tests must not change it."""
    from dsv3_jax.interop.pretrained import save_pretrained
    from tests.dsv3_jax import micro

    def make(base: Path) -> None:
        model = micro.model(ragged_config.model)
        for dtype in ("fp32", "bf16", "fp8"):
            save_pretrained(model, ragged_config, base / dtype, dtype=dtype, tokenizer=tokenizer)

    return made_once("ragged", make)


@pytest.fixture
def small_slices(monkeypatch):
    """Weights travel in slices, and lie in chunks, of 2^14 numbers instead of 2^23."""
    monkeypatch.setattr("dsv3_jax.interop.transfer.CHUNK_ELEMENTS", 2**14)
    monkeypatch.setattr("dsv3_jax.interop.sink.CHUNK_ELEMENTS", 2**14)
