"""What a path holds: a Hugging Face folder, PyTorch files, or a checkpoint of ours; opened for reading by slices."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from dsv3_jax.checkpoint import read_info, verify
from dsv3_jax.config import Config, ConfigError, ModelConfig, load_config
from dsv3_jax.interop.checkpoint_choice import Weights, choose_checkpoint
from dsv3_jax.interop.folder_files import carry_texts
from dsv3_jax.interop.hf_config import read_model_config
from dsv3_jax.interop.names import Tensor, leaf_shapes, tensors
from dsv3_jax.interop.safetensors_file import HFFolder
from dsv3_jax.interop.source import HFSource, OrbaxSource, Source
from dsv3_jax.interop.torch_file import TorchFolder
from dsv3_jax.orbax_store import ArraysReader

Kind = Literal["hf", "orbax", "memory"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Opened:
    """Weights ready to be read."""

    path: Path
    """The folder itself; of a run, the checkpoint chosen."""
    kind: Kind
    source: Source
    tensors: list[Tensor]
    """What there is to read, in the order of the layers."""
    config: Config
    step: int
    """The optimizer step of a checkpoint of ours, else 0."""
    tokens: int
    """Tokens consumed until then."""
    chunk_rows: Mapping[str, int]
    """Rows that our arrays hold in one chunk, by leaf."""
    texts: Mapping[str, str]
    """Tokenizer and what else lies beside the weights, by file name."""
    identity: str
    """Changes when the files do, or what is read of them."""

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.config.model


def kind_of(path: Path) -> Kind:
    """Whether a folder is laid out as Hugging Face's or as ours.

    Raises:
        ConfigError: neither.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name a Hugging Face folder, a run of dsv3 train or a checkpoint")
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        return "orbax"
    if (path / "config.json").is_file():
        return "hf"
    raise ConfigError(
        f"{path} holds neither config.json (a Hugging Face folder) nor checkpoints/ (a run of dsv3 train)"
    )


@contextlib.contextmanager
def open_weights(
    path: Path,
    *,
    step: int | None = None,
    weights: Weights = "params",
    allow_pickle: bool = False,
    cache_bytes: int = 64 * 2**20,
) -> Iterator[Opened]:
    """Open a folder, with everything checked that can be checked without reading the weights.

    Args:
        path: Hugging Face folder, run folder, or one checkpoint of a run.
        step: of a run, the checkpoint to read; None is the newest.
        weights: of a run, which copy of the weights.
        allow_pickle: read PyTorch's files where there are no safetensors. They are taken apart without running
            anything in them.
        cache_bytes: memory for chunks of our arrays that are read in parts.

    Raises:
        ConfigError: there is no such folder, or its architecture is not one of ours.
        WeightsError: tensors are missing, unexpected or unlike what the configuration says.
        CheckpointError: a checkpoint of ours is damaged.
    """
    if kind_of(path) == "hf":
        if step is not None or weights != "params":
            raise ConfigError(f"--step and --weights are for runs of dsv3 train, and {path} is a Hugging Face folder")
        with contextlib.ExitStack() as stack:
            yield _open_hf(path, allow_pickle, stack)
    else:
        yield _open_orbax(choose_checkpoint(path, step, weights), weights, cache_bytes)


def _open_hf(path: Path, allow_pickle: bool, stack: contextlib.ExitStack) -> Opened:
    model = read_model_config(path)
    safe = (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file()
    folder = stack.enter_context(TorchFolder(path) if allow_pickle and not safe else HFFolder(path))
    source = HFSource(folder, tensors(model), model)
    if source.skipped:
        _log.warning(
            "%s declares %d MTP layer(s) and holds none: the model is read without",
            path,
            model.num_nextn_predict_layers,
        )
        model = dataclasses.replace(model, num_nextn_predict_layers=_kept_depth(source, model))
    return Opened(
        path,
        "hf",
        source,
        source.wanted,
        Config(name=path.resolve().name, model=model),
        0,
        0,
        {},
        carry_texts(path),
        _identity(path),
    )


def _kept_depth(source: HFSource, model: ModelConfig) -> int:
    layers = {int(t.name.split(".")[2]) for t in source.wanted if t.name.startswith("model.layers.")}
    return len([layer for layer in layers if layer >= model.num_hidden_layers])


def _open_orbax(path: Path, weights: Weights, cache_bytes: int) -> Opened:
    verify(path)
    config = load_config(path / "config.toml")
    if weights == "ema" and not config.train.ema_decay:
        raise ConfigError(f"--weights ema: {path} keeps no moving average (train.ema_decay = 0); choose params")
    arrays = ArraysReader(path / "state", cache_bytes=cache_bytes)
    shapes = leaf_shapes(config.model)
    source = OrbaxSource(arrays, shapes, ema=weights == "ema")
    info = read_info(path)
    wanted = tensors(config.model)
    chunks = {t.leaf: arrays.chunk_shape(source.place(t.leaf))[-1 if t.transposed else len(t.index)] for t in wanted}
    texts, identity = carry_texts(path), f"{weights} {_identity(path)}"
    return Opened(path, "orbax", source, wanted, config, info.step, info.tokens, chunks, texts, identity)


def _identity(path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return repr([(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
