"""A small corpus. Our packages are imported inside fixtures: outside they would come before the devices are set."""

import inspect
import json
import random
import textwrap
from pathlib import Path

import pytest

_SOURCE = inspect.getsource(textwrap) + inspect.getsource(json.decoder) + inspect.getsource(random)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """60 documents of 60 to 1,800 characters, all different."""
    rng = random.Random(0)
    found = []
    for number in range(60):
        start = rng.randrange(len(_SOURCE) - 2000)
        found.append(f"# document {number}\n" + _SOURCE[start : start + rng.randrange(60, 1800)])
    return found


@pytest.fixture(scope="session")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as a folder of files."""
    root = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(texts):
        (root / f"{number:02d}.txt").write_text(text)
    return root


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]):
    from dsv3_jax.data import train_tokenizer

    return train_tokenizer([*texts, "汉字abc かな12345 " * 40, "  ):\n\n };\n" * 40], 512)


@pytest.fixture(scope="session")
def saved_tokenizer(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return path


@pytest.fixture(scope="session")
def settings(folder: Path, saved_tokenizer: Path):
    """A small configuration over the folder; sections given override it."""

    from dsv3_jax.config import load_config

    def make(**sections: dict):
        base = {
            "model": {"vocab_size": 512},
            "train": {"seq_len": 32, "batch_size": 4, "eval_sequences": 6},
            "data": {
                "source": str(folder), "tokenizer": str(saved_tokenizer), "pack_window": 8, "val_fraction": 0.1,
                "fim_rate": 0.3, "split_rate": 0.3,
            },
        }  # fmt: skip
        for name, values in sections.items():
            base[name] = base.get(name, {}) | values
        return load_config("tiny", base)

    return make


@pytest.fixture(scope="session")
def data(settings):
    from dsv3_jax.data import prepare_data

    return prepare_data(settings())
