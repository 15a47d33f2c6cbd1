"""Linear layers in FP8 (spec 11, 27.6): quantized operands, products accumulated in float32, float32 weight gradients.

A weight that takes part is an :class:`FP8Weight` in place of a float32 array in the tree of parameters: layers look at
that type and nothing else. The codes are made once per optimizer step (:func:`quantize_weights`, :func:`attach`).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.fp8_gemm import fp8_gemm, fp8_wgrad
from pallas_kernels.grouped_fp8_gemm import grouped_fp8_gemm, grouped_fp8_wgrad
from pallas_kernels.norm_quantize import norm_quantize
from pallas_kernels.quantize import Tiles, Weight, quantize_both, quantize_rows, quantize_weight, requantize_columns
from pallas_kernels.quantize.reference import TILE, pad_to_tiles
from sharding.rules import in_fp8

ROWS = TILE
"""Rows of one expert come in multiples of this: tokens that share a scale in the weight gradient."""

_log = logging.getLogger(__name__)


class Codes(NamedTuple):
    """A weight's codes with the contraction last, ``[*E, N, K]``, and the scale of each block of 128 x 128."""

    q: Any
    scale: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8Weight:
    """A master weight ``[..., in, out]`` and its codes in both orientations.

    No product reads the master, so that zeros may stand for it: it is there to receive the gradient, in float32.
    """

    master: Any
    """Float32; Any, for trees of shapes or gradients take this form too."""
    codes: Any
    """:class:`~pallas_kernels.quantize.Weight`, zero-padded to whole blocks of 128 x 128."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The master's shape."""
        return self.master.shape

    @property
    def forward(self) -> Codes:
        """What the product with the input reads."""
        return Codes(self.codes.q_NK, self.codes.scale_NK)

    @property
    def backward(self) -> Codes:
        """What the product with the output's gradient reads."""
        return Codes(self.codes.q_KN, self.codes.scale_KN)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Rows as an FP8 product reads them, and the array they were made from, which receives the gradient."""

    source: Any
    """``[*rows, K]``; read by no FP8 product, so that zeros may stand for it."""
    tiles: Any
    """1 x 128 tiles, ``q [M, K]`` and ``scale [KB, M]``, M padded with zero rows to a multiple of 128."""
    power_of_two: bool = dataclasses.field(metadata={"static": True})
    """Whether the scales are powers of two (spec 11.3)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape."""
        return self.source.shape


Normalized = tuple[Float[Array, "*rows K"] | Quantized, Float[Array, "*rows K"]]
"""A norm's output as products read it, and the norm's input for the residual path past it (see :func:`normalize`)."""


class Groups(NamedTuple):
    """Which expert each block of 128 rows belongs to; see :func:`~pallas_kernels.grouped_fp8_gemm.grouped_fp8_gemm`."""

    group_of_block: Int[Array, " MB"]
    num_blocks: Int[Array, ""]


def quantize_weights(params: Any, quantize: Callable[[str, Array], Weight] | None = None) -> dict[str, Weight]:
    """Codes of all weights of a parameter tree that take part, by path; one scale for each 128 x 128 block.

    Args:
        params: the tree.
        quantize: makes the codes of the weight at a path from its leaf, where that is not the whole weight.
    """
    _say_implementation(dispatch.hopper_obstacle())
    leaves, _ = jax.tree.flatten_with_path(params)
    of = quantize or (lambda _, leaf: quantize_weight(pad_to_tiles(leaf, 2)))
    return {name: of(name, leaf) for path, leaf in leaves if in_fp8(name := _name(path))}


def attach(params: Any, codes: Mapping[str, Weight]) -> Any:
    """The tree with an :class:`FP8Weight` where there are codes."""

    def leaf_of(path: Any, leaf: Any) -> Any:
        name = _name(path)
        return FP8Weight(leaf, codes[name]) if name in codes else leaf

    return jax.tree_util.tree_map_with_path(leaf_of, params)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.cache
def _say_implementation(obstacle: str | None) -> None:
    if obstacle is not None:
        _log.warning("FP8 products run through their XLA definitions, the same numbers but slower: %s", obstacle)


def quantize(x: Float[Array, "*rows K"], *, power_of_two: bool = False) -> Quantized:
    """Activations for FP8 products: 1 x 128 tiles along K, padded with zero rows to a multiple of 128."""
    x_MK = lax.stop_gradient(x).reshape(-1, x.shape[-1])
    tiles = quantize_rows(pad_to_tiles(x_MK, 2), power_of_two)
    return Quantized(x, Tiles(tiles.q[:, : x.shape[-1]], tiles.scale), power_of_two)


def normalize(
    x: Float[Array, "*rows K"],
    scale: Float[Array, " K"],
    eps: float,
    *,
    power_of_two: bool = False,
    with_output: bool = False,
) -> tuple[Quantized, Float[Array, "*rows K"]]:
    """:func:`quantize` of RMSNorm's output in one pass; ``x`` alone is kept, from which the backward normalizes again.

    Without ``with_output`` zeros stand for the output, which is then never written.

    Returns:
        The normalized rows; and ``x`` for a residual path, whose gradient the norm's backward adds in its one pass.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    how = {"eps": eps, "power_of_two": power_of_two, "with_output": with_output}
    tiles, y, again = norm_quantize(pad_rows(x_MK), scale, **how)
    y, again = (rows[: x_MK.shape[0]].reshape(x.shape) for rows in (y, again))
    return Quantized(y, tiles, power_of_two), again


def linear(x: Quantized, weight: FP8Weight) -> Float[Array, "*rows N"]:
    """``x @ weight``, in the dtype of what ``x`` was made from.

    Kept for the backward pass are the tiles of ``x``, 8 bits a value. Gradients of the output are quantized in 1 x 128
    tiles for the input's gradient, and in 128 x 1 tiles, like ``x`` then, for the weight's, which leaves in float32.
    """
    return _linear(x.source, x.tiles, weight, x.power_of_two)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(source: Array, tiles: Tiles, weight: FP8Weight, power_of_two: bool) -> Array:
    return _linear_fwd(source, tiles, weight, power_of_two)[0]


def _linear_fwd(source: Array, tiles: Tiles, weight: FP8Weight, power_of_two: bool) -> tuple[Array, Any]:
    y_MN = gemm(tiles, weight.forward, None, source.dtype)
    return trim(y_MN, source.shape[:-1], weight.shape[-1]), (tiles, weight.backward)


def _linear_bwd(power_of_two: bool, residuals: Any, dy: Array) -> tuple[Array, None, FP8Weight]:
    tiles, codes = residuals
    dim_k, dim_n = tiles.q.shape[1], dy.shape[-1]
    dy_rows, dy_columns = quantize_both(pad_to_tiles(dy.reshape(-1, dim_n), 2))
    dx_MK = gemm(dy_rows, codes, None, dy.dtype)
    dw_KN = wgrad(requantize_columns(tiles.q, tiles.scale, power_of_two), dy_columns, None)
    return trim(dx_MK, dy.shape[:-1], dim_k), None, gradient(dw_KN[:, :dim_n])


_linear.defvjp(_linear_fwd, _linear_bwd)


def gemm(tiles: Tiles, codes: Codes, groups: Groups | None, dtype: Any) -> Float[Array, "M N"]:
    """Rows times a weight, or each row times its expert's, in ``dtype``; the weight's padding is in the result."""
    q_MK = jnp.pad(tiles.q, ((0, 0), (0, codes.q.shape[-1] - tiles.q.shape[1])))
    if groups is None:
        return fp8_gemm(q_MK, tiles.scale, *codes, dtype=dtype)
    blocks, used = groups
    return grouped_fp8_gemm(q_MK, tiles.scale, *codes, blocks, num_blocks=used, dtype=dtype)


def wgrad(x: Tiles, dy: Tiles, groups: Groups | None, num_groups: int = 1) -> Float[Array, "..."]:
    """``x.T @ dy`` in float32, ``[K, N]`` or ``[E, K, N]``, of operands in 128 x 1 tiles."""
    if groups is None:
        return fp8_wgrad(*x, *dy)
    blocks, used = groups
    return grouped_fp8_wgrad(*x, *dy, blocks, num_groups=num_groups, num_blocks=used)


def gradient(dw: Float[Array, "..."]) -> FP8Weight:
    """The cotangent of an :class:`FP8Weight`: the master's."""
    return FP8Weight(dw, None)


def pad_rows(x_MK: Float[Array, "M K"]) -> Float[Array, "M2 K"]:
    """Zero rows after the last, up to a multiple of 128."""
    return jnp.pad(x_MK, ((0, -x_MK.shape[0] % ROWS), (0, 0)))


def trim(y_MN: Array, rows: tuple[int, ...], columns: int) -> Float[Array, "*rows N"]:
    """Without the padding of rows and columns, in the shape that the caller knows."""
    count = 1
    for size in rows:
        count *= size
    return y_MN[:count, :columns].reshape(*rows, columns)
