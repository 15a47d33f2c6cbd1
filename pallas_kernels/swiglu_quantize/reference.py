"""The definition of SwiGLU with quantized output and of its backward, in plain jax.numpy; also what runs elsewhere.

``gate_up [M, 2 I]`` holds the gate's columns first. The forward quantizes both the output and the inputs, which are all
that the backward keeps (spec 12): it computes the output again from them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.quantize import reference as quantizer
from pallas_kernels.quantize.reference import Tiles, round_to


def swiglu(gate_up_MF: Float[Array, "M F"], dtype: jnp.dtype) -> Float32[Array, "M I"]:
    """``silu(gate) * up`` in float32, rounded to ``dtype``."""
    gate_MI, up_MI = jnp.split(gate_up_MF.astype(jnp.float32), 2, axis=1)
    return round_to(jax.nn.silu(gate_MI) * up_MI, dtype)


def swiglu_quantize(gate_up_MF: Float[Array, "M F"], power_of_two: bool = False) -> tuple[Tiles, Tiles]:
    """Row-wise tiles of the output ``[M, I]``, and of the inputs ``[M, 2 I]`` to keep for the backward."""
    out = quantizer.quantize_rows(swiglu(gate_up_MF, gate_up_MF.dtype), power_of_two)
    return out, quantizer.quantize_rows(gate_up_MF, power_of_two)


class SwigluGradients(NamedTuple):
    """What the products after the backward read, all in tiles, and the gradient of the rows' weights."""

    rows: Tiles
    """Of ``gate_up``'s gradient, 1 x 128."""
    columns: Tiles
    """The same in 128 x 1, ``q [2 I, M]``."""
    out: Tiles
    """Of the output computed again, weighted, in 128 x 1, ``q [I, M]``."""
    dweight_M: Float32[Array, " M"] | None


def swiglu_backward(
    stored: Tiles, dout_MI: Float[Array, "M I"], power_of_two: bool = False, weight_M: Float[Array, " M"] | None = None
) -> tuple[Float[Array, "M F"], Tiles, Float32[Array, " M"] | None]:
    """The gradient of ``gate_up``, in the dtype of ``dout``; the output again in 128 x 1 tiles; that of the weights."""
    gate_up_MF, dtype = quantizer.dequantize_rows(*stored), dout_MI.dtype
    gate_MI, up_MI = jnp.split(gate_up_MF, 2, axis=1)
    dout32_MI, dweight_M = dout_MI.astype(jnp.float32), None
    sigmoid_MI = jax.nn.sigmoid(gate_MI)
    out_MI = gate_MI * sigmoid_MI * up_MI
    if weight_M is not None:
        dweight_M = jnp.sum(dout32_MI * out_MI, axis=1)
        dout32_MI, out_MI = (weight_M.astype(jnp.float32)[:, None] * x for x in (dout32_MI, out_MI))
    dgate_MI = dout32_MI * up_MI * sigmoid_MI * (1 + gate_MI * (1 - sigmoid_MI))
    dup_MI = dout32_MI * gate_MI * sigmoid_MI
    out = quantizer.quantize_columns(round_to(out_MI, dtype), power_of_two)
    dgate_up_MF = round_to(jnp.concatenate([dgate_MI, dup_MI], axis=1), dtype)
    return dgate_up_MF.astype(dtype), out, dweight_M


def swiglu_backward_quantize(
    stored: Tiles, dout_MI: Float[Array, "M I"], weight_M: Float[Array, " M"] | None = None, power_of_two: bool = False
) -> SwigluGradients:
    """:func:`swiglu_backward` with the gradient of ``gate_up`` in both forms of tiles."""
    dgate_up_MF, out, dweight_M = swiglu_backward(stored, dout_MI, power_of_two, weight_M)
    return SwigluGradients(*quantizer.quantize_both(dgate_up_MF, power_of_two), out, dweight_M)
