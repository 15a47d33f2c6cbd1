"""Weights that are FP8 codes and nothing else, for inference: a byte a number, read by the products as they lie."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Float32

from dsv3_jax.nn.fp8 import FP8Weight
from pallas_kernels.quantize import Weight
from pallas_kernels.quantize.reference import TILE, dequantize_blocks, pad_to_tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredFP8(FP8Weight):
    """An :class:`~dsv3_jax.nn.fp8.FP8Weight` without a master: layers read it as they read that one, and it has no
    gradient."""

    size: tuple[int, int] = dataclasses.field(metadata={"static": True}, default=(0, 0))
    """Rows and columns, in and out, without padding."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``[..., in, out]``."""
        return (*self.codes.q_NK.shape[:-2], *self.size)

    def dequantized(self, dtype: DTypeLike) -> Float[Array, "*lead in_ out"]:
        """The numbers themselves, for what is no product with activations: MLA's up-projection moved to the query."""
        rows, columns = self.size
        whole = dequantize_blocks(self.codes.q_NK, self.codes.scale_NK, jnp.dtype(dtype))
        return jnp.swapaxes(whole, -1, -2)[..., :rows, :columns]


@jax.jit
def stored(values: Float8e4m3fn[Array, "*lead K N"], scales: Float32[Array, "*lead KB NB"]) -> StoredFP8:
    """From codes as our arrays keep them and the scale of each block of 128 x 128.

    Raises:
        ValueError: the scales are not those of whole blocks from the first row and column on. Arrays of two parts side
            by side, gate and up, are so only where a part's columns are a multiple of 128.
    """
    rows, columns = values.shape[-2:]
    if scales.shape[-2:] != (-(-rows // TILE), -(-columns // TILE)):
        raise ValueError(f"stored: {rows} x {columns} codes in blocks of 128 have no scales of {scales.shape[-2:]}")
    q_NK = pad_to_tiles(jnp.swapaxes(values, -1, -2), 2)
    absent: Any = None  # the orientation that a backward pass reads
    return StoredFP8(absent, Weight(q_NK, jnp.swapaxes(scales, -1, -2), absent, absent), (rows, columns))
