"""``swiglu_quantize``: SwiGLU with quantized output and FP8-cached inputs, with its gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.once import once
from pallas_kernels.quantize import pallas_sm90 as quantizer
from pallas_kernels.quantize.reference import Tiles
from pallas_kernels.swiglu_quantize import backward_sm90, pallas_sm90, reference
from pallas_kernels.swiglu_quantize.reference import SwigluGradients


def swiglu_quantize(
    gate_up_MF: Float[Array, "M F"],
    *,
    power_of_two: bool = False,
    implementation: dispatch.Implementation = "auto",
) -> tuple[Tiles, Tiles]:
    """``silu(gate) * up`` of ``gate_up [M, 2 I]``, the gate's columns first, in 1 x 128 tiles.

    It has no gradient of its own that could reach through the codes: a layer keeps the second result, the inputs in
    FP8, and calls :func:`swiglu_backward` (spec 12). :func:`swiglu_with_gradient` does so for layers that compose.

    The Hopper kernel takes bfloat16 or float16 with M and I multiples of 128; ``auto`` falls back to XLA elsewhere.

    Args:
        gate_up_MF: both projections, F = 2 I.
        power_of_two: round scales up to powers of two.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``.

    Returns:
        Tiles of the output ``[M, I]``, rounded to the dtype of ``gate_up`` first, and of ``gate_up`` itself.

    Raises:
        ValueError: F is odd, or the implementation asked for cannot run.
    """
    if gate_up_MF.shape[1] % 2:
        raise ValueError(f"swiglu_quantize: gate_up_MF must have an even number of columns, got {gate_up_MF.shape[1]}")
    chosen = dispatch.choose("swiglu_quantize", implementation, {"pallas": pallas_sm90.obstacle(gate_up_MF)})
    if chosen == "pallas":
        return once(pallas_sm90.swiglu_quantize, power_of_two=power_of_two)(gate_up_MF)
    return reference.swiglu_quantize(gate_up_MF, power_of_two)


def swiglu_backward(
    stored: Tiles, dout_MI: Float[Array, "M I"], *, power_of_two: bool = False
) -> tuple[Float[Array, "M F"], Tiles]:
    """The gradient of ``gate_up`` and the output again, from the inputs that the forward kept.

    Args:
        stored: the second result of :func:`swiglu_quantize`.
        dout_MI: gradient of the output.
        power_of_two: round scales up to powers of two.

    Returns:
        The gradient ``[M, 2 I]`` in the dtype of ``dout_MI``, and the output in 128 x 1 tiles, ``q [I, M]``: what the
        weight gradient of the down projection contracts.
    """
    return reference.swiglu_backward(stored, dout_MI, power_of_two)[:2]


def swiglu_backward_quantize(
    stored: Tiles,
    dout_MI: Float[Array, "M I"],
    weight_M: Float[Array, " M"] | None = None,
    *,
    power_of_two: bool = False,
    implementation: dispatch.Implementation = "auto",
) -> SwigluGradients:
    """:func:`swiglu_backward` with all that it writes quantized, which is all that the three products after it read.

    With ``weight_M`` each row's output is multiplied by a number, as a gate value multiplies an expert's.

    The Hopper kernel takes bfloat16 or float16 with M and I multiples of 128; ``auto`` falls back to XLA elsewhere.

    Args:
        stored: the second result of :func:`swiglu_quantize`.
        dout_MI: gradient of the (weighted) output.
        weight_M: the rows' weights; None: 1, without a gradient.
        power_of_two: round scales up to powers of two.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``.

    Returns:
        Tiles of the gradient of ``gate_up`` in both forms and of the weighted output, each rounded to the dtype of
        ``dout_MI`` first; the gradient of the weights, float32.

    Raises:
        ValueError: the implementation asked for cannot run.
    """
    chosen = dispatch.choose("swiglu_backward_quantize", implementation, {"pallas": quantizer.obstacle(dout_MI)})
    if chosen == "pallas":
        return once(backward_sm90.swiglu_backward_quantize, power_of_two=power_of_two)(stored, dout_MI, weight_M)
    return reference.swiglu_backward_quantize(stored, dout_MI, weight_M, power_of_two)


def swiglu_with_gradient(
    gate_up_MF: Float[Array, "M F"],
    *,
    power_of_two: bool = False,
    implementation: dispatch.Implementation = "auto",
) -> tuple[Tiles, Float[Array, "M I"]]:
    """Tiles of the output, and zeros that carry its gradient back, as the second result of ``norm_quantize`` does."""
    return _with_gradient(gate_up_MF, power_of_two, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _with_gradient(gate_up: Array, power_of_two: bool, implementation: dispatch.Implementation) -> tuple[Tiles, Array]:
    return _forward(gate_up, power_of_two, implementation)[0]


def _forward(
    gate_up: Array, power_of_two: bool, implementation: dispatch.Implementation
) -> tuple[tuple[Tiles, Array], Tiles]:
    out, stored = swiglu_quantize(gate_up, power_of_two=power_of_two, implementation=implementation)
    return (out, jnp.zeros(out.q.shape, gate_up.dtype)), stored


def _backward(power_of_two: bool, implementation: str, stored: Tiles, cotangents: tuple[Tiles, Array]) -> tuple[Array]:
    return (swiglu_backward(stored, cotangents[1], power_of_two=power_of_two)[0],)


_with_gradient.defvjp(_forward, _backward)
