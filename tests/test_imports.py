"""Imports go one way only: between the packages, between the rooms of dsv3_jax, and out to other libraries."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pallas_kernels", "sharding", "dsv3_jax")

# Each room of dsv3_jax may read itself and the rooms named here; rooms are files or folders of that name.
_TRUNK = ("config", "nn", "model", "chunks", "checkpoint", "orbax_store", "interop", "inference", "train")
ROOMS = {room: set(_TRUNK[:i]) for i, room in enumerate(_TRUNK)}
ROOMS["posttrain"] = ROOMS["evals"] = set(_TRUNK)
ROOMS["cli"] = {*_TRUNK, "posttrain", "evals"}
ROOMS["data"] = ROOMS["planning"] = {"config"}
for _above_model in ("checkpoint", "interop", "inference", "train", "posttrain", "evals", "cli"):
    ROOMS[_above_model] = ROOMS[_above_model] | {"data"}
for _reader in ("inference", "train", "cli"):
    ROOMS[_reader] = ROOMS[_reader] | {"planning"}

# What planning reads of sharding: rules and sizes, nothing that runs on devices.
_PLANNED = ("sharding.pipeline", "sharding.rules", "sharding.expert_parallel")

# What each package may import besides the standard library: for the uppermost, what pyproject.toml declares.
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_DECLARED = _PROJECT["dependencies"]
_DISTRIBUTIONS = {re.match(r"[\w-]+", entry).group().replace("-", "_") for entry in _DECLARED}
LIBRARIES = {
    "pallas_kernels": {"jax", "numpy", "jaxtyping"},
    "sharding": {"jax", "numpy", "jaxtyping", "matplotlib"},
    "dsv3_jax": _DISTRIBUTIONS - {"orbax_checkpoint"} | {"orbax"},
}


# Modules that need an extra, which is then what they may import besides; FastAPI comes on Starlette and pydantic.
EXTRAS = {
    "dsv3_jax.inference.server": {"fastapi", "starlette", "pydantic"},
    "dsv3_jax.cli.serve": {"uvicorn"},
}


def imported(path: Path, module: str) -> list[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, wherever in the file it does."""
    found = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def violations(root: Path) -> list[str]:
    """Every import under ``root`` that goes against the rules, as ``file:line: reason``."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            relative = path.relative_to(root)
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            for line, name in imported(path, module):
                reason = _reason(module, name)
                if reason:
                    found.append(f"{relative}:{line}: {reason}")
    return found


def _reason(module: str, name: str) -> str:
    package, target = module.partition(".")[0], name.partition(".")[0]
    if target not in PACKAGES:
        known = LIBRARIES[package].union(*(extra for prefix, extra in EXTRAS.items() if module.startswith(prefix)))
        outside = target not in known and target not in sys.stdlib_module_names
        return f"{package} may not import {target}" if outside else ""
    if PACKAGES.index(target) > PACKAGES.index(package):
        return f"{package} may not import {target}"
    if package != "dsv3_jax" or module == "dsv3_jax":
        return ""
    room = module.split(".")[1]
    if room not in ROOMS:
        return f"room {room} is not in the table of this test"
    if target == "dsv3_jax":
        other = name.split(".")[1] if "." in name else ""
        if other != room and other not in ROOMS[room]:
            return f"{room} may not import {name}"
    elif room in ("config", "data"):
        return f"{room} may not import {name}"
    elif room == "planning" and not name.startswith(_PLANNED):
        return f"planning may not import {name}, only {', '.join(_PLANNED)}"
    return ""


def test_every_import_follows_the_rules():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("pallas_kernels/a.py", "import flax", "pallas_kernels may not import flax"),
        ("pallas_kernels/a/b.py", "def f():\n    import sharding.mesh", "pallas_kernels may not import sharding"),
        ("sharding/mesh.py", "from flax import nnx", "sharding may not import flax"),
        ("sharding/mesh.py", "from dsv3_jax.config import Config", "sharding may not import dsv3_jax"),
        ("dsv3_jax/config/a.py", "from dsv3_jax.nn.norm import RMSNorm", "config may not import dsv3_jax.nn"),
        ("dsv3_jax/nn/a.py", "from ..model import DeepSeekV3", "nn may not import dsv3_jax.model"),
        ("dsv3_jax/nn/a.py", "from dsv3_jax.data import Loader", "nn may not import dsv3_jax.data"),
        ("dsv3_jax/model.py", "from dsv3_jax import train", "model may not import dsv3_jax.train"),
        ("dsv3_jax/train/a.py", "import dsv3_jax as ds", "train may not import dsv3_jax"),
        ("dsv3_jax/train/a.py", "from dsv3_jax.cli import main", "train may not import dsv3_jax.cli"),
        ("dsv3_jax/posttrain/a.py", "from dsv3_jax.evals import run", "posttrain may not import dsv3_jax.evals"),
        ("dsv3_jax/data/a.py", "import sharding.mesh", "data may not import sharding.mesh"),
        ("dsv3_jax/planning/a.py", "import sharding.mesh", "only sharding.pipeline"),
        ("dsv3_jax/data/a.py", "import torch", "dsv3_jax may not import torch"),
        ("dsv3_jax/inference/a.py", "import fastapi", "dsv3_jax may not import fastapi"),
        ("dsv3_jax/attic/a.py", "from dsv3_jax.config import Config", "room attic is not in the table"),
    ],
)
def test_a_planted_wrong_import_is_found(tmp_path, file, text, reason):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (found,) = violations(tmp_path)
    assert found.startswith(file)
    assert reason in found


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("pallas_kernels/a.py", "import math, jax, numpy\nfrom jax.experimental import pallas\nfrom . import dims"),
        ("sharding/mesh.py", "from pallas_kernels.dispatch import choose"),
        ("dsv3_jax/nn/a.py", "from .norm import RMSNorm\nfrom sharding.mesh import x\nfrom flax import nnx"),
        ("dsv3_jax/train/a.py", "from dsv3_jax.planning import peak_flops\nfrom dsv3_jax.data import Loader"),
        ("dsv3_jax/planning/a.py", "from sharding.pipeline import schedule"),
        ("dsv3_jax/inference/server/a.py", "import fastapi, pydantic"),
        ("dsv3_jax/__init__.py", "from dsv3_jax.train import trainer"),
    ],
)
def test_right_imports_pass(tmp_path, file, text):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path) == []
