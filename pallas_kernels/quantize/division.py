"""Division in the Hopper kernels: the true quotient's code, bit for bit, at the price of three multiplications.

A kernel's own ``/`` is within two units in the last place. Here a quotient ``q0 = x r``, with the correctly rounded
reciprocal ``r`` of ``s``, is corrected by its exact remainder, ``q = q0 - (q0 s - x) r``, in fused multiply-adds. Then

- ``amax / 448`` is the correctly rounded quotient (tested for all significands);
- ``e4m3(q)`` is ``e4m3`` of the correctly rounded ``x / s``. They could differ only where ``q`` and that lie on two
  sides of a boundary ``m`` between codes, so where ``x / s`` is nearly ``m`` plus half a unit. There ``q0`` is ``m`` or
  the next number, for it is less than a unit off, or, where the significand of ``x`` is below that of ``s``, less than
  the quotient of the two plus a half, which is at most 31/32 + 1/2; and from there ``q`` is correctly rounded
  (P. Markstein, IBM J. Res. Dev. 34, 1990).

A quotient that is zero has the sign of ``x``, which e4m3 keeps: an exact remainder is ``+0`` as written, and taking it
away changes no zero; ``q0 + (x - q0 s) r`` would turn ``-0`` into ``+0``.

An ``x`` of 16 bits needs one instruction less, ``q = x r + x t`` with an ``r`` a little below ``1 / s`` and the rest
``t`` of it: ``x r`` is exact in the fused sum, ``x t`` has the sign of ``x`` even where it is zero. Where ``s`` is
1 / 448 of another such number this is the correctly rounded quotient, for all pairs of significands (tested). A power
of two has an exact reciprocal.

The sequences are written over an ``Arithmetic``, so that a test can run them in exact numbers.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith
from jax._src.lib.mlir.dialects import math as mlir_math
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantize.reference import E4M3_MAX
from pallas_kernels.quantize.registers import approximate_reciprocal

RECIPROCAL_OF_MAX = float(np.float32(1) / np.float32(E4M3_MAX))


@runtime_checkable
class Arithmetic(Protocol):
    """Operations of float32, each rounded once to nearest even."""

    def constant(self, value: float, like: Any) -> Any:
        """``value`` in the shape of ``like``."""
        ...

    def multiply(self, a: Any, b: Any) -> Any:
        """``a b``."""
        ...

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """``a b + c``, rounded once."""
        ...

    def negative(self, a: Any) -> Any:
        """``-a``."""
        ...


def corrected_quotient(ops: Arithmetic, x: Any, s: Any, r: Any) -> Any:
    """``x / s`` from ``r``, the correctly rounded ``1 / s``."""
    q0 = ops.multiply(x, r)
    return ops.fma(ops.negative(ops.fma(q0, s, ops.negative(x))), r, q0)


def quotient_of_16_bits(ops: Arithmetic, x: Any, r: Any, rest: Any) -> Any:
    """``x / s`` of bfloat16 or float16 ``x``, from ``r`` and :func:`rest_of_reciprocal`."""
    return ops.fma(x, r, ops.multiply(x, rest))


def rest_of_reciprocal(ops: Arithmetic, s: Any, r: Any) -> Any:
    """``1 / s - r`` for an ``r`` at most a few units in the last place below ``1 / s``."""
    return ops.multiply(ops.fma(ops.negative(r), s, ops.constant(1.0, s)), r)


def refined_reciprocal(ops: Arithmetic, s: Any, near: Any) -> Any:
    """``1 / s``: what ``rcp.rn`` does, without its branch for numbers near either end of the exponents, which no scale
    is."""
    return ops.fma(near, ops.negative(ops.fma(s, near, ops.constant(-1.0, near))), near)


def scale_quotient(ops: Arithmetic, amax: Any) -> Any:
    """``amax / 448``."""
    return corrected_quotient(ops, amax, ops.constant(E4M3_MAX, amax), ops.constant(RECIPROCAL_OF_MAX, amax))


class _Registers:
    """On values of MLIR, whose ``mulf`` and ``fma`` become ``mul.rn`` and ``fma.rn`` without flushing to zero."""

    def constant(self, value: float, like: Any) -> Any:
        return _filled(ir.FloatAttr.get(ir.F32Type.get(), value), like)

    def multiply(self, a: Any, b: Any) -> Any:
        return arith.mulf(a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return mlir_math.fma(a, b, c)

    def negative(self, a: Any) -> Any:
        return arith.negf(a)


def _pointwise(function: Any, layout: Any, *arrays: Array) -> Array:
    """``function`` of the registers of float32 arrays in ``layout``; those after the first may be scalars."""

    @plgpu.inline_mgpu(
        arg_types=(layout,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct(arrays[0].shape, jnp.float32, layout=layout),
    )
    def run(ctx: Any, first: Any, *rest: Any) -> Any:
        del ctx
        return first._pointwise(function, *rest)

    return run(*arrays)


def scale_in_kernel(amax: Array, layout: Any, power_of_two: bool) -> Array:
    """``amax / 448`` of an array in ``layout`` or of a scalar, rounded up if asked for; infinity and NaN stay so."""
    make = _power_of_two_scale if power_of_two else functools.partial(scale_quotient, _Registers())
    return jnp.where(amax < jnp.inf, _pointwise(make, layout, amax), amax if not power_of_two else jnp.inf)


def divide_in_kernel(x: Array, scale: Array, layout: Any, scale_layout: Any, power_of_two: bool, narrow: bool) -> Array:
    """What has the code of ``x / scale``, for ``x`` in ``layout``; one scale for its last dim, or a scalar.

    ``narrow`` promises values of 16 bits and scales that are 1 / 448 of such a value or of 1e-4. Where a scale is not
    finite, so is no quotient.
    """

    def along(value: Array) -> Array:
        return lax.broadcast_in_dim(value, x.shape, range(value.ndim)) if value.ndim else value

    ops = _Registers()
    if power_of_two or narrow:
        quotient, factors = quotient_by(scale, scale_layout, power_of_two)
        return _pointwise(quotient, layout, x, *map(along, factors))
    inverse = _pointwise(_reciprocal, scale_layout, scale)
    return _pointwise(functools.partial(corrected_quotient, ops), layout, x, along(scale), along(inverse))


def quotient_by(scale: Array, layout: Any, power_of_two: bool) -> tuple[Callable[..., Any], list[Array]]:
    """How registers of 16-bit numbers, or any where scales are powers of two, are divided, and what else it takes: the
    function's further arguments, one for each scale."""
    ops = _Registers()
    if power_of_two:
        return ops.multiply, [_pointwise(_power_of_two_reciprocal, layout, scale)]
    below = _pointwise(_below_reciprocal, layout, scale)
    rest = _pointwise(functools.partial(rest_of_reciprocal, ops), layout, scale, below)
    return functools.partial(quotient_of_16_bits, ops), [below, rest]


def _power_of_two_scale(amax: Any) -> Any:
    bits = _as_integer(scale_quotient(_Registers(), amax))
    raised = arith.addi(bits, _integer(0x7FFFFF, bits))
    return arith.bitcast(amax.type, arith.andi(raised, _integer(0x7F800000, bits)))


def _power_of_two_reciprocal(scale: Any) -> Any:
    """Scales are at least 1e-4 / 448 and at most 2 ** 120, or infinite: all reciprocals are normal numbers."""
    bits = _as_integer(scale)
    return arith.bitcast(scale.type, arith.subi(_integer(254 << 23, bits), bits))


def _below_reciprocal(scale: Any) -> Any:
    """At most four units in the last place below ``1 / scale``, from which the approximation is at most one away."""
    bits = _as_integer(approximate_reciprocal(scale))
    return arith.bitcast(scale.type, arith.subi(bits, _integer(2, bits)))


def _reciprocal(scale: Any) -> Any:
    return refined_reciprocal(_Registers(), scale, approximate_reciprocal(scale))


def _as_integer(value: Any) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    wide = isinstance(value.type, ir.VectorType)
    return arith.bitcast(ir.VectorType.get(value.type.shape, i32) if wide else i32, value)


def _integer(value: int, like: Any) -> Any:
    return _filled(ir.IntegerAttr.get(ir.IntegerType.get_signless(32), value), like)


def _filled(attribute: Any, like: Any) -> Any:
    if isinstance(like.type, ir.VectorType):
        attribute = ir.DenseElementsAttr.get_splat(like.type, attribute)
    return arith.constant(like.type, attribute)
