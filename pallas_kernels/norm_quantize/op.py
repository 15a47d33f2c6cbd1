"""``norm_quantize``: RMSNorm whose output is quantized on the way out, with its gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.norm_quantize import backward_sm90, pallas_sm90, reference
from pallas_kernels.once import once
from pallas_kernels.quantize.op import quantize_rows
from pallas_kernels.quantize.reference import Tiles


@jax.named_scope("quantizer")
def norm_quantize(
    x_MK: Float[Array, "M K"],
    weight_K: Float[Array, " K"],
    *,
    eps: float,
    power_of_two: bool = False,
    with_output: bool = False,
    implementation: dispatch.Implementation = "auto",
) -> tuple[Tiles, Float[Array, "M K"], Float[Array, "M K"]]:
    """``y = x / sqrt(mean(x^2) + eps) * weight``, rounded to the dtype of x, in 1 x 128 tiles.

    The gradient goes through the second result: give what consumes the tiles that array too, and let its own VJP
    return the gradient of y for it and zeros for the tiles. Only x and the weight are kept; the backward computes the
    norm again (spec 12).

    The Hopper kernels take bfloat16 or float16 with M a multiple of 128 and K of 256; ``auto`` falls back to XLA
    elsewhere. Codes may differ where the float32 mean square, summed in another order, rounds y otherwise.

    Args:
        x_MK: rows to normalize.
        weight_K: the norm's scale, float32 or the dtype of x.
        eps: added to the mean square.
        power_of_two: round the tiles' scales up to powers of two.
        with_output: whether y itself is wanted.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``.

    Returns:
        The tiles of y; y in the dtype of x, without ``with_output`` zeros in its place, which cost nothing; and x for
        a residual path that leads past the norm. That one's gradient, if there is any, is added to the norm's in the
        pass that computes it, and the sum rounded once.

    Raises:
        ValueError: the implementation asked for cannot run.
    """
    chosen = _choose("norm_quantize", implementation, x_MK)
    return _norm_quantize(x_MK, weight_K, eps, power_of_two, with_output, chosen)


def norm_backward(
    x_MK: Float[Array, "M K"],
    weight_K: Float[Array, " K"],
    dy_MK: Float[Array, "M K"],
    dresidual_MK: Float[Array, "M K"] | None = None,
    *,
    eps: float,
    implementation: dispatch.Implementation = "auto",
) -> tuple[Float[Array, "M K"], Float[Array, " K"]]:
    """Gradients of x and of the weight, each in its dtype, from the gradient of y; the norm is computed again.

    Args:
        x_MK: the norm's input.
        weight_K: the norm's scale.
        dy_MK: gradient of y.
        dresidual_MK: what is added to the gradient of x before it is rounded, in the dtype of x.
        eps: added to the mean square.
        implementation: as of :func:`norm_quantize`; the Hopper kernel takes the same arrays.

    Raises:
        ValueError: the implementation asked for cannot run.
    """
    chosen = _choose("norm_backward", implementation, x_MK)
    function = backward_sm90.norm_backward if chosen == "pallas" else reference.norm_backward
    dx_MK, dweight_K = once(function, eps=eps)(x_MK, weight_K, dy_MK, dresidual_MK)
    return dx_MK, dweight_K.astype(weight_K.dtype)


def _choose(operation: str, implementation: str, x: Array) -> str:
    return dispatch.choose(operation, implementation, {"pallas": pallas_sm90.obstacle(x)})


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _norm_quantize(
    x: Array, weight: Array, eps: float, power_of_two: bool, with_output: bool, chosen: str
) -> tuple[Tiles, Array, Array]:
    how = {"eps": eps, "power_of_two": power_of_two, "with_output": with_output}
    run = once(pallas_sm90.norm_quantize, **how) if chosen == "pallas" else functools.partial(_in_two_steps, **how)
    tiles, y = run(x, weight)
    return tiles, jnp.zeros_like(x) if y is None else y, x


def _in_two_steps(
    x: Array, weight: Array, *, eps: float, power_of_two: bool, with_output: bool
) -> tuple[Tiles, Array | None]:
    """The definition, with a kernel for its quantizer where there is one."""
    y = reference.rms_norm(x, weight, eps).astype(x.dtype)
    return quantize_rows(y, power_of_two), y if with_output else None


def _forward(x: Any, weight: Any, *how: Any) -> tuple[tuple[Tiles, Array, Array], tuple[Array, Array]]:
    saved = x.value, weight.value
    return _norm_quantize(*saved, *how), saved


def _backward(
    eps: float,
    power_of_two: bool,
    with_output: bool,
    chosen: dispatch.Implementation,
    saved: tuple[Array, Array],
    cotangents: tuple[Any, Array | SymbolicZero, Array | SymbolicZero],
) -> tuple[Array, Array]:
    _, dy, dresidual = cotangents
    dy = jnp.zeros_like(saved[0]) if isinstance(dy, SymbolicZero) else dy
    dresidual = None if isinstance(dresidual, SymbolicZero) else dresidual
    return norm_backward(*saved, dy, dresidual, eps=eps, implementation=chosen)


_norm_quantize.defvjp(_forward, _backward, symbolic_zeros=True)
