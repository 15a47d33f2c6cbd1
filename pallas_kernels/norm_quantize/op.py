"""``norm_quantize``: RMSNorm whose output is quantized on the way out, with its gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.norm_quantize import pallas_sm90, reference
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
) -> tuple[Tiles, Float[Array, "M K"]]:
    """``y = x / sqrt(mean(x^2) + eps) * weight``, rounded to the dtype of x, in 1 x 128 tiles.

    The gradient goes through the second result: give what consumes the tiles that array too, and let its own VJP
    return the gradient of y for it and zeros for the tiles. Only x and the weight are kept; the backward computes the
    norm again (spec 12).

    The Hopper kernel takes bfloat16 or float16 with M a multiple of 128 and K of 256; ``auto`` falls back to XLA
    elsewhere. Codes may differ where the float32 mean square, summed in another order, rounds y otherwise.

    Args:
        x_MK: rows to normalize.
        weight_K: the norm's scale, float32 or the dtype of x.
        eps: added to the mean square.
        power_of_two: round the tiles' scales up to powers of two.
        with_output: whether y itself is wanted.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``.

    Returns:
        The tiles of y, and y in the dtype of x; without ``with_output`` zeros in its place, which cost nothing.

    Raises:
        ValueError: the implementation asked for cannot run.
    """
    chosen = dispatch.choose("norm_quantize", implementation, {"pallas": pallas_sm90.obstacle(x_MK)})
    return _norm_quantize(x_MK, weight_K, eps, power_of_two, with_output, chosen)


def norm_backward(
    x_MK: Float[Array, "M K"], weight_K: Float[Array, " K"], dy_MK: Float[Array, "M K"], *, eps: float
) -> tuple[Float[Array, "M K"], Float[Array, " K"]]:
    """Gradients of x and of the weight, each in its dtype, from the gradient of y; the norm is computed again."""
    dx_MK, dweight_K = reference.norm_backward(x_MK, weight_K, dy_MK, eps)
    return dx_MK, dweight_K.astype(weight_K.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _norm_quantize(
    x: Array, weight: Array, eps: float, power_of_two: bool, with_output: bool, chosen: str
) -> tuple[Tiles, Array]:
    how = {"eps": eps, "power_of_two": power_of_two, "with_output": with_output}
    run = once(pallas_sm90.norm_quantize, **how) if chosen == "pallas" else functools.partial(_in_two_steps, **how)
    tiles, y = run(x, weight)
    return tiles, jnp.zeros_like(x) if y is None else y


def _in_two_steps(
    x: Array, weight: Array, *, eps: float, power_of_two: bool, with_output: bool
) -> tuple[Tiles, Array | None]:
    """The definition, with a kernel for its quantizer where there is one."""
    y = reference.rms_norm(x, weight, eps).astype(x.dtype)
    return quantize_rows(y, power_of_two), y if with_output else None


def _forward(
    x: Array, weight: Array, eps: float, power_of_two: bool, with_output: bool, chosen: str
) -> tuple[tuple[Tiles, Array], tuple[Array, Array]]:
    return _norm_quantize(x, weight, eps, power_of_two, with_output, chosen), (x, weight)


def _backward(
    eps: float,
    power_of_two: bool,
    with_output: bool,
    chosen: str,
    saved: tuple[Array, Array],
    cotangents: tuple[Tiles, Array],
) -> tuple[Array, Array]:
    return norm_backward(*saved, cotangents[1], eps=eps)


_norm_quantize.defvjp(_forward, _backward)
