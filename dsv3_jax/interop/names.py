"""Names and transposes of the published checkpoints against ours: one table a family, read in both directions.

Every tensor of a Hugging Face folder is a slice of one of our arrays: ours are stacked by layer and by expert, hold
``gate`` and ``up`` side by side, and keep matrices as [in, out] where theirs are [out, in] (spec 4.2, 15.2, 29).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model import abstract_model, split_model

BLOCK = 128
"""Rows and columns of an FP8 weight's block (spec 15.1)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table."""

    ours: str
    """Path of the array, from the module it belongs to."""
    theirs: str
    """Name from the module it belongs to; ``{expert}`` where each expert has a tensor."""
    transposed: bool = True
    """A matrix, [in, out] in ours."""
    fp8: bool = False
    """Quantized in an FP8 checkpoint."""
    part: int = 0
    """Which of ``parts`` equal shares of our last dim."""
    parts: int = 1
    float32: bool = False
    """Float32 in a checkpoint of any type."""


def _linear(ours: str, theirs: str, part: int = 0, parts: int = 1) -> Row:
    return Row(ours, f"{theirs}.weight", fp8=True, part=part, parts=parts)


def _vector(ours: str, theirs: str) -> Row:
    return Row(ours, f"{theirs}.weight", transposed=False)


NORMS = (_vector("attention_norm/scale", "input_layernorm"), _vector("ffn_norm/scale", "post_attention_layernorm"))

MLA = (
    _linear("attention/kv_down/kernel", "self_attn.kv_a_proj_with_mqa"),
    _vector("attention/kv_norm/scale", "self_attn.kv_a_layernorm"),
    _linear("attention/kv_up/kernel", "self_attn.kv_b_proj"),
    _linear("attention/out/kernel", "self_attn.o_proj"),
)
MLA_QUERY_COMPRESSED = (
    _linear("attention/q_down/kernel", "self_attn.q_a_proj"),
    _vector("attention/q_norm/scale", "self_attn.q_a_layernorm"),
    _linear("attention/q_up/kernel", "self_attn.q_b_proj"),
)
MLA_QUERY_PLAIN = (_linear("attention/q_up/kernel", "self_attn.q_proj"),)
MHA = (
    _linear("attention/query/kernel", "self_attn.q_proj"),
    _linear("attention/key/kernel", "self_attn.k_proj"),
    _linear("attention/value/kernel", "self_attn.v_proj"),
    _linear("attention/out/kernel", "self_attn.o_proj"),
)
DENSE = (
    _linear("ffn/gate_up/kernel", "mlp.gate_proj", 0, 2),
    _linear("ffn/gate_up/kernel", "mlp.up_proj", 1, 2),
    _linear("ffn/down/kernel", "mlp.down_proj"),
)
ROUTED = (
    Row("moe/router/kernel", "mlp.gate.weight"),
    _linear("moe/gate_up", "mlp.experts.{expert}.gate_proj", 0, 2),
    _linear("moe/gate_up", "mlp.experts.{expert}.up_proj", 1, 2),
    _linear("moe/down", "mlp.experts.{expert}.down_proj"),
)
ROUTER_BIAS = (Row("moe/router/bias", "mlp.gate.e_score_correction_bias", transposed=False, float32=True),)
SHARED = (
    _linear("moe/shared/gate_up/kernel", "mlp.shared_experts.gate_proj", 0, 2),
    _linear("moe/shared/gate_up/kernel", "mlp.shared_experts.up_proj", 1, 2),
    _linear("moe/shared/down/kernel", "mlp.shared_experts.down_proj"),
)
EMBEDDING = Row("embedding/table", "model.embed_tokens.weight", transposed=False)
FINAL_NORM = Row("final_norm/scale", "model.norm.weight", transposed=False)
HEAD = Row("head/kernel", "lm_head.weight")
MTP = (
    Row("embedding_norm/scale", "enorm.weight", transposed=False),
    Row("hidden_norm/scale", "hnorm.weight", transposed=False),
    Row("project/kernel", "eh_proj.weight"),
    Row("head_norm/scale", "shared_head.norm.weight", transposed=False),
)
MTP_COPIES = {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": HEAD}
"""What an MTP layer's own embedding and head are copies of: one array in ours."""

IGNORED_ENDINGS = ("rotary_emb.inv_freq",)
"""Buffers that old exports carry and that follow from the configuration."""


def block_table(config: ModelConfig, *, moe: bool) -> tuple[Row, ...]:
    """The rows of one layer of this configuration: the family's table."""
    rows = NORMS
    if config.attention == "mla":
        rows += (MLA_QUERY_COMPRESSED if config.q_lora_rank else MLA_QUERY_PLAIN) + MLA
    else:
        rows += MHA
    if not moe:
        return rows + DENSE
    rows += ROUTED + (ROUTER_BIAS if config.has_router_bias else ())
    return rows + (SHARED if config.n_shared_experts else ())


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face folder, and the slice of ours that holds its numbers."""

    name: str
    shape: tuple[int, ...]
    leaf: str
    """Our array by its path: ``params/moe/moe/gate_up``."""
    index: tuple[int, ...]
    """Layer and expert in the leading dims of the leaf."""
    columns: tuple[int, int]
    """Start and stop in the leaf's last dim; all of it for what is not transposed."""
    transposed: bool
    fp8: bool
    float32: bool
    part: int
    copy: bool = False
    """A second copy of what another tensor holds: written, and on reading only compared."""

    @property
    def scale_name(self) -> str:
        """The FP8 scales' tensor."""
        return f"{self.name}_scale_inv"

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Blocks of a matrix by rows and columns (spec 15.1)."""
        rows, columns = self.shape
        return math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every array of the model, by path: ``params/...`` and ``router_bias/...``. Nothing is allocated."""
    return dict(_leaf_shapes(config))


@functools.lru_cache(maxsize=8)
def _leaf_shapes(config: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Remembered: the model is traced for it."""
    parts = split_model(abstract_model(config))
    tree = {"params": parts.params, "router_bias": parts.router_bias}
    return tuple(
        (jax.tree_util.keystr(path, simple=True, separator="/"), tuple(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    )


def scale_leaf(leaf: str) -> str:
    """Path of the FP8 scales of an array: ``scale_inv/moe/moe/gate_up``."""
    return "scale_inv/" + leaf.partition("/")[2]


def scale_leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the scales' arrays of a model kept in FP8: [..., in blocks, out blocks], gate's before up's."""
    shapes, found = leaf_shapes(config), {}
    for tensor in tensors(config):
        if tensor.fp8:
            shape = shapes[tensor.leaf]
            parts = shape[-1] // (tensor.columns[1] - tensor.columns[0])
            rows, columns = tensor.scale_shape
            found[scale_leaf(tensor.leaf)] = (*shape[:-2], columns, parts * rows)
    return found


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of this model's Hugging Face folder in the order of the layers, without FP8 scales.

    MTP modules are the layers after the last, as in the release (spec 15.2).

    Raises:
        ConfigError: ``mtp_concat = "hidden_first"``, which the layout cannot say.
    """
    if config.num_nextn_predict_layers and config.mtp_concat == "hidden_first":
        raise ConfigError(
            "model.mtp_concat = 'hidden_first' has no place in the published layout, whose eh_proj reads the "
            "embedding first: train with 'embedding_first' or leave the MTP modules out"
        )
    return list(_tensors(config, leaf_shapes(config)))


def _tensors(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> Iterator[Tensor]:
    yield from _of_row(EMBEDDING, "", "", (), shapes)
    dense, depth = config.n_dense_layers, config.num_hidden_layers
    for layer in range(depth):
        moe = layer >= dense
        prefix, place = ("moe", layer - dense) if moe else ("dense", layer)
        for row in block_table(config, moe=moe):
            yield from _of_row(row, f"{prefix}/", f"model.layers.{layer}.", (place,), shapes)
    yield from _of_row(FINAL_NORM, "", "", (), shapes)
    if not config.tie_word_embeddings:
        yield from _of_row(HEAD, "", "", (), shapes)
    for k in range(config.num_nextn_predict_layers):
        theirs = f"model.layers.{depth + k}."
        for row in block_table(config, moe=config.n_routed_experts > 0):
            yield from _of_row(row, f"mtp/{k}/block/", theirs, (), shapes)
        for row in MTP:
            yield from _of_row(row, f"mtp/{k}/", theirs, (), shapes)
        for name, original in MTP_COPIES.items():
            source = EMBEDDING if config.tie_word_embeddings else original
            for tensor in _of_row(source, "", "", (), shapes):
                yield dataclasses.replace(tensor, name=theirs + name, copy=True)


def _of_row(
    row: Row, ours: str, theirs: str, index: tuple[int, ...], shapes: dict[str, tuple[int, ...]]
) -> Iterator[Tensor]:
    root = "router_bias" if row in ROUTER_BIAS else "params"
    leaf = f"{root}/{ours}{row.ours}"
    shape = shapes[leaf]
    width = shape[-1] // row.parts
    columns = (row.part * width, (row.part + 1) * width)
    experts = range(shape[len(index)]) if "{expert}" in row.theirs else (None,)
    for expert in experts:
        place = index if expert is None else (*index, expert)
        inner = shape[len(place) :]
        yield Tensor(
            name=theirs + row.theirs.format(expert=expert),
            shape=(width, inner[0]) if row.transposed else inner,
            leaf=leaf,
            index=place,
            columns=columns,
            transposed=row.transposed,
            fp8=row.fp8,
            float32=row.float32,
            part=row.part,
        )
