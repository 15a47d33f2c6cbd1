"""Fixtures that ask torch and transformers. Without them tests skip and say so; where CI=true they fail instead."""

import fcntl
import os
import warnings
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
def hf_families(oracle, tmp_path_factory) -> dict[str, answers.Family]:
    """Every family's folder as transformers wrote it, with its answers: made once for all of xdist's workers.

    Folders are shared: tests must not change them.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "hf_families"
    shared.mkdir(exist_ok=True)
    families = {
        name: answers.Family(name, config, shared / name, shared / f"{name}.npz", shared / f"{name}.again.npz")
        for name, config in FAMILIES.items()
    }
    with Path(shared, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "made").exists():
            jobs = [job for seed, family in enumerate(families.values()) for job in _jobs(family, seed)]
            oracle([*jobs, {"do": "safetensors_dump", "folder": shared / "v3", "out": shared / "v3.dump.npz"}])
            (shared / "made").touch()
    return families


def _jobs(family: answers.Family, seed: int) -> list[dict]:
    make = {"do": "make", "config": family.config, "seed": seed, "folder": family.folder, "out": family.answers_file}
    make["published"] = family.name in PUBLISHED_STYLE
    read = {"do": "read", "folder": family.folder, "tokens": family.answers_file, "out": family.again_file}
    return [make, read]
