"""What lies beside the weights: tokenizer, chat template, generation settings; carried along, or made."""

import json
from pathlib import Path

from dsv3_jax.config import ConfigError
from dsv3_jax.data.chat_template import CHAT_TEMPLATE
from dsv3_jax.data.tokenizer import BOS, EOS, PAD, Tokenizer
from dsv3_jax.interop.tensor_io import WeightsError

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Text files that a conversion takes along unchanged."""


def carry_texts(folder: Path) -> dict[str, str]:
    """The files of :data:`CARRIED` that a folder has; of a checkpoint, also those of its run.

    Raises:
        ConfigError: one of them is not UTF-8 text.
    """
    found: dict[str, str] = {}
    homes = [folder, folder.parent.parent] if (folder / "manifest.json").is_file() else [folder]
    for name in CARRIED:
        for home in homes:
            if name not in found and (home / name).is_file():
                try:
                    found[name] = (home / name).read_bytes().decode("utf-8")
                except (OSError, UnicodeDecodeError) as error:
                    raise ConfigError(f"{home / name} cannot be read as text: {error}") from error
    return found


def tokenizer_texts(tokenizer: Tokenizer, max_length: int) -> dict[str, str]:
    """The files that make ``AutoTokenizer`` open our tokenizer, with V3's chat template."""
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD if tokenizer.encode(PAD, parse_special=True) == [tokenizer.pad_id] else EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": tokenizer.definition,
        "tokenizer_config.json": json.dumps(told, indent=2, ensure_ascii=False) + "\n",
    }


def write_texts(folder: Path, texts: dict[str, str], *, verify: bool = False) -> None:
    """Write text files into a folder, line ends as they are.

    Raises:
        WeightsError: ``verify``, and files read back are different; they are named.
    """
    contents = {folder / name: text.encode() for name, text in texts.items()}
    for path, content in contents.items():
        path.write_bytes(content)
    bad = [path.name for path, content in contents.items() if path.read_bytes() != content] if verify else []
    if bad:
        raise WeightsError(f"read back and different: {', '.join(bad)}; convert again, and check the disk")
