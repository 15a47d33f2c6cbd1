"""Our arrays from opened weights, each laid onto its devices; a process reads the slices that its devices need."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_jax.checkpoint import restore, stored_arrays
from dsv3_jax.config import ConfigError
from dsv3_jax.interop.block_fp8 import E4M3, scale_rows
from dsv3_jax.interop.checkpoint_choice import Weights
from dsv3_jax.interop.hf_config import WeightsDtype
from dsv3_jax.interop.names import BLOCK, Tensor, leaf_shapes, scale_leaf, scale_leaf_shapes
from dsv3_jax.interop.opened import Opened
from dsv3_jax.interop.sink import array_dtypes
from dsv3_jax.interop.source import F32, HFSource
from dsv3_jax.interop.transfer import cast

Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Where an array goes: from its path (``params/moe/moe/gate_up``) and shape."""

type _Span = tuple[int, int]
"""Start and stop."""

_THREADS = 4
"""Arrays read at a time."""


def load_leaves(
    opened: Opened,
    *,
    dtype: WeightsDtype,
    placement: Placement | None = None,
    weights: Weights = "params",
) -> dict[str, jax.Array]:
    """Every array of the model by path: ``params/...``, ``router_bias/...``.

    With ``dtype="fp8"`` what is stored in FP8 stays so, its scales beside it as ``scale_inv/...`` of [..., in blocks,
    out blocks], and the rest is bfloat16.

    Raises:
        ConfigError: FP8 is asked for and the weights are stored in another type.
        WeightsError: the files are damaged.
    """
    place = placement or _default_placement
    if opened.kind == "orbax":
        return _from_checkpoint(opened, dtype, place, "ema" if weights == "ema" else "params")
    reader = LeafReader(opened)
    kinds = {leaf: reader.dtype(leaf, dtype) for leaf in reader.shapes}
    scales = [scale_leaf(leaf) for leaf, kind in kinds.items() if kind == E4M3]
    if dtype == "fp8" and not scales:
        raise _not_fp8(opened)
    shapes = reader.shapes | {leaf: reader.scale_shapes[leaf] for leaf in scales}

    def load(leaf: str) -> jax.Array:
        read = reader.read_scales if leaf in scales else functools.partial(reader.read, dtype=kinds[leaf])
        return jax.make_array_from_callback(shapes[leaf], place(leaf, shapes[leaf]), functools.partial(read, leaf))

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(shapes, pool.map(load, shapes), strict=True))


class LeafReader:
    """Slices of our arrays, put together from the tensors of a Hugging Face folder that hold them."""

    def __init__(self, opened: Opened):
        assert isinstance(opened.source, HFSource)
        self._source = opened.source
        self.shapes = leaf_shapes(opened.model)
        self.scale_shapes = scale_leaf_shapes(opened.model)
        self._tensors: dict[str, list[Tensor]] = {}
        for tensor in opened.tensors:
            if not tensor.copy:
                self._tensors.setdefault(tensor.leaf, []).append(tensor)

    def dtype(self, leaf: str, dtype: WeightsDtype) -> np.dtype:
        """The type that an array gets."""
        held = self._tensors[leaf]
        kept = dtype == "fp8" and any(self._source.dtype(tensor) == E4M3 for tensor in held)
        return array_dtypes(held, self._source.dtype, "keep" if kept else "bf16" if dtype == "fp8" else dtype)[leaf]

    def read(self, leaf: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The slice ``index`` of an array; of each tensor only what is in it is read, in FP8 to the edges of blocks."""
        fetch = functools.partial(self._block, dtype=dtype)
        return _gather(self._tensors[leaf], self.shapes[leaf], index, dtype, lambda tensor: tensor.columns, fetch)

    def read_scales(self, leaf: str, index: tuple[slice, ...]) -> np.ndarray:
        """The slice ``index`` of an array of scales; nothing else is read."""

        def columns(tensor: Tensor) -> tuple[int, int]:
            count = tensor.scale_shape[0]
            return tensor.part * count, (tensor.part + 1) * count

        held = self._tensors[leaf.replace("scale_inv/", "params/", 1)]
        return _gather(held, self.scale_shapes[leaf], index, F32, columns, self._source.scale_block)

    def _block(self, tensor: Tensor, rows: _Span, columns: _Span | None, dtype: np.dtype) -> np.ndarray:
        if self._source.dtype(tensor) != E4M3 or dtype == E4M3:
            return cast(self._source.block(tensor, rows, columns), None, dtype, tensor.name)[0]
        assert columns is not None
        top, left = (start // BLOCK * BLOCK for start, _ in (rows, columns))
        values = self._source.block(tensor, (top, rows[1]), (left, columns[1]))
        scales = self._source.scale_block(tensor, scale_rows(*rows), scale_rows(*columns))
        return cast(values, scales, dtype, tensor.name)[0][rows[0] - top :, columns[0] - left :]


def _gather(
    held: Sequence[Tensor],
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    dtype: np.dtype,
    columns_of: Callable[[Tensor], _Span],
    fetch: Callable[[Tensor, _Span, _Span | None], np.ndarray],
) -> np.ndarray:
    """The slice ``index`` of an array from rows and columns of tensors; ``columns_of`` says where their rows are."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], dtype)
    for tensor in held:
        if any(not start <= at < stop for at, (start, stop) in zip(tensor.index, bounds, strict=False)):
            continue
        place = tuple(at - start for at, (start, _) in zip(tensor.index, bounds, strict=False))
        inner = bounds[len(tensor.index) :]
        if not tensor.transposed:
            out[place] = fetch(tensor, inner[0], inner[1] if len(inner) == 2 else None)
            continue
        inputs, (start, stop) = inner
        first, last = columns_of(tensor)
        low, high = max(start, first), min(stop, last)
        if low < high:
            found = fetch(tensor, (low - first, high - first), inputs)
            out[(*place, slice(None), slice(low - start, high - start))] = found.T
    return out


def _from_checkpoint(opened: Opened, dtype: WeightsDtype, place: Placement, root: str) -> dict[str, jax.Array]:
    """Restored by Orbax, which reads what each device needs, then cast where it lies."""
    stored = stored_arrays(opened.path)
    shapes, scale_shapes = leaf_shapes(opened.model), scale_leaf_shapes(opened.model)
    names = {leaf: f"{root}/{leaf.partition('/')[2]}" if leaf.startswith("params/") else leaf for leaf in shapes}
    names |= {leaf: leaf for leaf in scale_shapes if leaf in stored}
    if dtype == "fp8" and not any(leaf in stored for leaf in scale_shapes):
        raise _not_fp8(opened)
    abstract = {}
    for leaf, name in names.items():
        shape = scale_shapes.get(leaf) or shapes[leaf]
        kind = jnp.dtype(stored[name]["dtype"])
        abstract[name] = jax.ShapeDtypeStruct(shape, kind, sharding=place(leaf, shape))
    found = restore(opened.path, abstract, partial=True)
    leaves = {leaf: found[name] for leaf, name in names.items()}
    if dtype == "fp8":
        return {leaf: x if x.dtype in (E4M3, F32) else x.astype(jnp.bfloat16) for leaf, x in leaves.items()}
    parts = {t.leaf: shapes[t.leaf][-1] // (t.columns[1] - t.columns[0]) for t in opened.tensors if t.transposed}
    want = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[dtype]
    cast_leaves = {}
    for leaf in shapes:
        kind = jnp.float32 if leaf.startswith("router_bias/") else want
        if leaves[leaf].dtype == E4M3:
            cast_leaves[leaf] = dequantize_leaf(leaves[leaf], leaves[scale_leaf(leaf)], parts[leaf], kind)
        else:
            cast_leaves[leaf] = leaves[leaf].astype(kind)
    return cast_leaves


@functools.partial(jax.jit, static_argnums=(2, 3))
def dequantize_leaf(
    values: Float[Array, "*lead K N"], scales: Float[Array, "*lead KB NB"], parts: int, dtype: DTypeLike
) -> Float[Array, "*lead K N"]:
    """An array kept in FP8 times its blocks' scales, in float32, then cast.

    ``parts`` arrays lie side by side in the last dim (gate and up), each with blocks of its own.
    """
    *lead, inner, outer = values.shape
    spread = jnp.repeat(scales, BLOCK, axis=-2)[..., :inner, :]
    spread = jnp.repeat(spread.reshape(*lead, inner, parts, -1), BLOCK, axis=-1)[..., : outer // parts]
    return (values.astype(jnp.float32) * spread.reshape(values.shape)).astype(dtype)


def _not_fp8(opened: Opened) -> ConfigError:
    return ConfigError(f"dtype = 'fp8': {opened.path} holds no FP8 weights; make some with dsv3 convert --dtype fp8")


def _default_placement(leaf: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
