"""The public quantizers, with the choice of implementation. None has a gradient of its own: layers define theirs."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float8e4m3fn, Float32

from pallas_kernels import dispatch
from pallas_kernels.once import once
from pallas_kernels.quantize import e5m6, e5m6_sm90, pallas_sm90, reference
from pallas_kernels.quantize.e5m6 import PackedE5M6
from pallas_kernels.quantize.reference import Tiles


class Weight(NamedTuple):
    """A quantized weight in both orientations: the same codes, and one scale for each 128 x 128 block.

    Each GEMM wants its contraction last: ``q_NK`` is for the product with the input, ``q_KN`` for that with the
    output's gradient.
    """

    q_NK: Float8e4m3fn[Array, "*G N K"]
    scale_NK: Float32[Array, "*G NB KB"]
    q_KN: Float8e4m3fn[Array, "*G K N"]
    scale_KN: Float32[Array, "*G KB NB"]


def without_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of arrays, which raises a TypeError where it is differentiated."""
    opaque = jax.custom_vjp(function)

    def forward(*arguments: Any) -> Any:
        raise TypeError(f"{function.__name__} has no gradient: call it inside a layer that defines its own")

    opaque.defvjp(forward, lambda *_: ())
    return opaque


@jax.named_scope("quantizer")
def _run(name: str, implementation: str, power_of_two: bool, *arrays: Array) -> Any:
    """The function ``name`` of the chosen module on ``arrays``."""
    why = pallas_sm90.obstacle(arrays[0], _DTYPES.get(name, _ACTIVATIONS))
    chosen = dispatch.choose(name, implementation, {"pallas": why})
    function = getattr({"pallas": pallas_sm90, "xla": reference}[chosen], name)
    if chosen == "pallas":
        function = once(function, power_of_two=power_of_two)
    else:
        function = functools.partial(function, power_of_two=power_of_two)

    def run(*arrays: Array) -> Any:
        return function(*arrays)

    run.__name__ = name
    return without_gradient(run)(*arrays)


_ACTIVATIONS = ("bfloat16", "float16")
_DTYPES = {"requantize_columns": ("float8_e4m3fn",), "quantize_weight": ("float32", *_ACTIVATIONS)}


def quantize_rows(
    x_MK: Float[Array, "M K"], power_of_two: bool = False, *, implementation: dispatch.Implementation = "auto"
) -> Tiles:
    """1 x 128 tiles along K (spec 11.1, 11.3): ``q [M, K]``, ``scale [ceil(K / 128), M]``.

    The Hopper kernel takes bfloat16 or float16 with M and K multiples of 128; ``auto`` falls back to XLA elsewhere.

    Args:
        x_MK: activations or gradients. A tile with an infinity or a NaN gets a scale that is not finite and zero codes.
        power_of_two: round scales up to powers of two.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``; all give the same bits.

    Raises:
        ValueError: the implementation asked for cannot run.
        TypeError: differentiated.
    """
    return _run("quantize_rows", implementation, power_of_two, x_MK)


def quantize_columns(
    x_MK: Float[Array, "M K"], power_of_two: bool = False, *, implementation: dispatch.Implementation = "auto"
) -> Tiles:
    """128 x 1 tiles along M, as the rows of the transpose: ``q [K, M]``, ``scale [ceil(M / 128), K]``.

    It is what the weight gradient's GEMM contracts. Otherwise as :func:`quantize_rows`.
    """
    return _run("quantize_columns", implementation, power_of_two, x_MK)


def quantize_both(
    x_MK: Float[Array, "M K"], power_of_two: bool = False, *, implementation: dispatch.Implementation = "auto"
) -> tuple[Tiles, Tiles]:
    """:func:`quantize_rows` and :func:`quantize_columns`; the Hopper kernel reads ``x_MK`` once."""
    return _run("quantize_both", implementation, power_of_two, x_MK)


def requantize_columns(
    q_MK: Float8e4m3fn[Array, "M K"],
    scale: Float32[Array, "KB M"],
    power_of_two: bool = False,
    *,
    implementation: dispatch.Implementation = "auto",
) -> Tiles:
    """The 128 x 1 form of stored 1 x 128 tiles: dequantized, transposed, quantized again (spec 11.1).

    Between powers of two (of ``scale`` and, with ``power_of_two``, of the result) no value changes that stays out of
    the subnormals of its new tile; otherwise values are rounded a second time. Otherwise as :func:`quantize_rows`.
    """
    return _run("requantize_columns", implementation, power_of_two, q_MK, scale)


@jax.named_scope("quantizer")
def quantize_and_pack(
    x_MK: Float[Array, "M K"], *, implementation: dispatch.Implementation = "auto"
) -> tuple[Tiles, PackedE5M6]:
    """:func:`quantize_rows` with scales that are powers of two, and :func:`~pallas_kernels.quantize.pack_e5m6`.

    The Hopper kernel, which reads ``x_MK`` once, wants K to be a multiple of 256. Otherwise as :func:`quantize_rows`.
    """
    chosen = dispatch.choose("quantize_and_pack", implementation, {"pallas": e5m6_sm90.obstacle(x_MK)})
    if chosen == "pallas":
        return once(e5m6_sm90.quantize_and_pack)(x_MK)
    return reference.quantize_rows(x_MK, power_of_two=True), e5m6.pack_e5m6(x_MK)


@jax.named_scope("quantizer")
def unpack_and_quantize_columns(
    stored: PackedE5M6, dtype: jax.typing.DTypeLike, *, implementation: dispatch.Implementation = "auto"
) -> tuple[Float[Array, "M K"], Tiles]:
    """:func:`~pallas_kernels.quantize.unpack_e5m6`, and :func:`quantize_columns` of that with powers of two as scales.

    The Hopper kernel, which makes both in one pass, wants K to be a multiple of 256. Otherwise as
    :func:`quantize_rows`.
    """
    why = e5m6_sm90.unpack_obstacle(stored, dtype)
    if dispatch.choose("unpack_and_quantize_columns", implementation, {"pallas": why}) == "pallas":
        return once(e5m6_sm90.unpack_and_quantize_columns, dtype=jnp.dtype(dtype))(stored)
    x_MK = e5m6.unpack_e5m6(stored, dtype)
    return x_MK, quantize_columns(x_MK, power_of_two=True, implementation=implementation)


def quantize_weight(
    w_KN: Float[Array, "*G K N"], power_of_two: bool = False, *, implementation: dispatch.Implementation = "auto"
) -> Weight:
    """128 x 128 blocks of weights stored ``[in, out]``, in both orientations.

    Leading dims (experts, layers) are independent weights. The Hopper kernel takes float32, bfloat16 or float16
    masters with K and N multiples of 128. Otherwise as :func:`quantize_rows`.
    """
    lead = w_KN.shape[:-2]
    w_GKN = w_KN.reshape(math.prod(lead), *w_KN.shape[-2:])
    parts = _run("quantize_weight", implementation, power_of_two, w_GKN)
    q_KN, q_NK, scale_KN = (part.reshape(*lead, *part.shape[1:]) for part in parts)
    return Weight(q_NK, scale_KN.mT, q_KN, scale_KN)


def check_finite(x: Float[Array, "..."], name: str) -> None:
    """Refuses infinities and NaNs before they are quantized; for use outside ``jax.jit``, it waits for the device.

    Raises:
        ValueError: ``x`` holds one; ``name``, their count and the first one's place are told.
    """
    finite = np.asarray(_is_finite(x))
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(f"{name}: {int((~finite).sum())} values are not finite, the first at {first}")


@jax.jit
def _is_finite(x: Float[Array, "..."]) -> Bool[Array, "..."]:
    return jnp.isfinite(x)
