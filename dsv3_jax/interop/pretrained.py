"""``from_pretrained`` and ``save_pretrained``: a model from a folder and into one."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.interop.block_fp8 import E4M3
from dsv3_jax.interop.checkpoint_choice import Weights
from dsv3_jax.interop.convert import Options, write_weights
from dsv3_jax.interop.destination import check_destination
from dsv3_jax.interop.folder_files import tokenizer_texts
from dsv3_jax.interop.hf_config import WeightsDtype
from dsv3_jax.interop.leaves import Placement, load_leaves
from dsv3_jax.interop.names import leaf_shapes, scale_leaf, tensors
from dsv3_jax.interop.opened import Opened, open_weights
from dsv3_jax.interop.source import TreeSource
from dsv3_jax.model import DeepSeekV3, Tree, abstract_model, merge_model, split_model
from dsv3_jax.nn.fp8_stored import stored


class Pretrained(NamedTuple):
    """A model ready to use."""

    model: DeepSeekV3
    config: Config
    """Of a run, the run's own; of a Hugging Face folder, its architecture with the defaults of everything else."""
    tokenizer: Tokenizer | None
    """None where the folder has no tokenizer.json."""


def from_pretrained(
    path: str | Path,
    *,
    dtype: Literal["fp32", "bf16", "fp8"] = "fp32",
    step: int | None = None,
    weights: Weights = "params",
    placement: Placement | None = None,
    allow_pickle: bool = False,
) -> Pretrained:
    """Model, configuration and tokenizer of a Hugging Face folder or of a run of ``dsv3 train``.

    Args:
        path: Hugging Face folder (V3, R1 and what shares their ``model_type``, V2, V2-Lite, DeepSeekMoE, llama layout;
            float32, bfloat16, float16 or block FP8), run folder, or one checkpoint of a run.
        dtype: type of the parameters; FP8 is multiplied out in float32 and then cast. Selection biases stay float32.
            With ``fp8`` what is stored in FP8 stays so, for inference: products read the codes, activations are
            quantized in their turn (spec 11.1), and the rest is bfloat16.
        step: of a run, the checkpoint to read; None is the newest.
        weights: of a run: ``params`` as trained, ``ema`` their moving average, ``best`` those of the checkpoint with
            the lowest validation.
        placement: sharding of each array by its path and shape; a process reads the slices of its own devices and
            nothing else. None puts everything on the default device.
        allow_pickle: read ``pytorch_model.bin`` where there are no safetensors; nothing in it is run.

    Raises:
        ConfigError: the folder, the checkpoint or what was asked of it is not there, or its architecture is not ours.
        WeightsError: tensors are missing, unexpected, damaged, or unlike what the configuration says; all of them.
        CheckpointError: a checkpoint of ours is damaged.
    """
    with open_weights(Path(path), step=step, weights=weights, allow_pickle=allow_pickle) as opened:
        leaves: Any = load_leaves(opened, dtype=dtype, placement=placement, weights=weights)
        text = opened.texts.get("tokenizer.json")
        tokenizer = None if text is None else Tokenizer(text, str(opened.path / "tokenizer.json"))
    graph, params, bias = split_model(abstract_model(opened.model))
    if dtype == "fp8":
        leaves = _kept_in_fp8(leaves, opened)
    filled = _filled({"params": params, "router_bias": bias}, leaves)
    return Pretrained(merge_model(graph, filled["params"], filled["router_bias"]), opened.config, tokenizer)


def save_pretrained(
    model: DeepSeekV3,
    config: Config,
    out: str | Path,
    *,
    dtype: WeightsDtype = "bf16",
    tokenizer: Tokenizer | None = None,
    force: bool = False,
) -> Path:
    """Write a model as a Hugging Face folder: sharded safetensors with V3's names, and what opens them.

    Args:
        model: its arrays may lie on any devices of this process.
        config: the model's run; its architecture becomes ``config.json``.
        out: the new folder.
        dtype: ``fp8`` quantizes the matrices of FP8 Linears in blocks of 128 x 128 and keeps the rest in bfloat16, as
            the release does (spec 15).
        tokenizer: written with V3's chat template.
        force: replace a folder of weights that is there.

    Raises:
        ConfigError: the folder may not be written, or no published architecture computes this model.
        WeightsError: a value that FP8 cannot hold.
    """
    if config.model != model.config:
        raise ConfigError("config.model is not the configuration that the model was made with")
    final = Path(out)
    check_destination(final, force)
    parts = split_model(model)
    leaves = _by_path({"params": parts.params, "router_bias": parts.router_bias})
    opened = Opened(
        path=final,
        kind="memory",
        source=TreeSource(leaves),
        tensors=tensors(config.model),
        config=config,
        step=0,
        tokens=0,
        chunk_rows={},
        texts={} if tokenizer is None else tokenizer_texts(tokenizer, config.model.max_position_embeddings),
        identity=uuid.uuid4().hex,
    )
    write_weights(opened, final, Options(to="hf", dtype=dtype, force=force), lambda phase, done, total: None)
    return final


def load_into(path: str | Path, abstract: Tree) -> Tree:
    """The weights of a folder as float32, for training to begin with.

    Args:
        path: what :func:`from_pretrained` reads.
        abstract: ``{"params": ..., "router_bias": ...}`` of ``jax.ShapeDtypeStruct`` with shardings.

    Raises:
        ConfigError, WeightsError, CheckpointError: as :func:`from_pretrained`; or the folder's model has other arrays.
    """
    wanted = _by_path(abstract)
    with open_weights(Path(path)) as opened:
        there = leaf_shapes(opened.model)
        faults = [
            f"{leaf} is {_shape(there.get(leaf))} there and {_shape(getattr(wanted.get(leaf), 'shape', None))} here"
            for leaf in sorted(there.keys() | wanted.keys())
            if leaf not in wanted or there.get(leaf) != wanted[leaf].shape
        ]
        if faults:
            raise ConfigError(f"{path} holds another model than this configuration's: {'; '.join(faults)}")
        leaves = load_leaves(opened, dtype="fp32", placement=lambda leaf, shape: wanted[leaf].sharding)
    return _filled(abstract, leaves)


def tokenizer_of(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a folder that :func:`load_into` reads; None where it has none.

    Raises:
        ConfigError, WeightsError, CheckpointError: as :func:`from_pretrained`.
    """
    with open_weights(Path(path)) as opened:
        text = opened.texts.get("tokenizer.json")
        return None if text is None else Tokenizer(text, str(opened.path / "tokenizer.json"))


def _by_path(tree: Tree) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def _filled(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[jax.tree_util.keystr(path, simple=True, separator="/")], tree
    )


def _kept_in_fp8(leaves: dict[str, jax.Array], opened: Opened) -> dict[str, Any]:
    """Codes with their scales as the layers read them; biases of routers in float32."""
    found: dict[str, Any] = {}
    for leaf in sorted(leaves.keys() - {name for name in leaves if name.startswith("scale_inv/")}):
        if leaf.startswith("router_bias/"):
            found[leaf] = leaves[leaf].astype(jnp.float32)
        elif leaves[leaf].dtype == E4M3:
            try:
                found[leaf] = stored(leaves.pop(leaf), leaves[scale_leaf(leaf)])
            except ValueError as error:
                raise ConfigError(
                    f"dtype = 'fp8': {leaf} of {opened.path} is of parts that are no multiple of 128 wide; take 'bf16'"
                ) from error
        else:
            found[leaf] = leaves[leaf]
    return found


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
