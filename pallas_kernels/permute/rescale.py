"""Codes in registers times the scales of their rows, and quantized again: in float16 where that is exact.

Scales of activations are powers of two from 2 ** -22, that of 1e-4, and nearly always at most 1. Then a code times
its scale times 128 is a float16 number, whose bits at 2 ** -24 suffice for the smallest code with the smallest scale;
and what it is multiplied by to become a code of its column lies in float16, too. A product that is rounded there lies
below 2 ** -21, which is no code. So the codes are those of float32 (all of them are tried in a test), at two numbers an
instruction and without conversions in between. Other scales, infinite ones among them, take float32.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mlir import i32, integer, joined, larger_magnitudes, of_words, parts_of, scalar, words_of
from pallas_kernels.permute.turn import HALF, LINE, TURNED, array, inline, pointer
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import TILE
from pallas_kernels.quantize.tile_loop import F8

RAISED = 128
"""What products in float16 are multiplied by."""

SMALLEST, LARGEST = 2.0**-22, 1.0
"""Scales between which powers of two take float16."""


def fit(scale: Array) -> Array:
    """Whether products with ``scale`` are exact in float16."""
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    return (bits & 0x7FFFFF == 0) & (scale >= SMALLEST) & (scale <= LARGEST)


def note(factors: Any, fits: Any, scales: Array, *, interpret: Any) -> None:
    """Writes the factors of products in float16 and, for each warp's 32 scales, 1 if all of them fit."""
    factor = (scales * RAISED).astype(jnp.float16)
    fitting = jnp.where(fit(scales), jnp.int32(1), jnp.int32(0))
    factors[...] = factor
    if interpret:
        fits[...] = jnp.min(fitting.reshape(4, -1), axis=1)
        return

    @inline(arg_types=(plgpu.RefType(), LINE), return_type=())
    def run(ctx: Any, ref: Any, fitting: Any) -> Any:
        del ctx
        asm = (
            "{ .reg .pred one, all; setp.ne.b32 one, $1, 0; vote.sync.all.pred all, one, 0xffffffff; "
            "selp.b32 $0, 1, 0, all; }"
        )
        every = llvm.inline_asm(i32(), [scalar(fitting.registers.flat[0])], asm, "=r,r", has_side_effects=True)
        warp = arith.remui(arith.divui(utils.thread_idx(), integer(32)), integer(4))
        llvm.store(every, pointer(ref, arith.muli(warp, integer(4))))
        return ()

    run(fits, fitting)


def products(codes: Array, along: Any, *, interpret: Any) -> Array:
    """Codes in ``TURNED`` times one number of shared memory for each column, in that number's dtype."""
    dtype = along.dtype
    if interpret:
        return codes.astype(dtype) * along[...]

    @inline(arg_types=(TURNED, plgpu.RefType()), return_type=plgpu.ShapeDtypeStruct((HALF, TILE), dtype, layout=TURNED))
    def run(ctx: Any, codes: Any, ref: Any) -> Any:
        del ctx
        size = jnp.dtype(dtype).itemsize
        lane = arith.remui(utils.thread_idx(), integer(4))
        of = ir.VectorType.get([8], utils.dtype_to_ir_type(dtype))
        places = [arith.muli(arith.addi(lane, integer(first)), integer(8 * size)) for first in range(0, TILE // 8, 4)]
        loaded = [llvm.load(of, pointer(ref, place), alignment=16) for place in places]
        registers = []
        for number, register in enumerate(codes.registers.flat):
            factors = loaded[number // 2]
            words = [word for pair in parts_of(words_of(register)) for word in _widened(pair)]
            if size == 2:
                made = [_multiplied(*pair) for pair in zip(words, parts_of(words_of(factors)), strict=True)]
                registers.append(of_words(made, of))
            else:
                pairs = of_words(words, ir.VectorType.get([8], ir.F16Type.get()))
                registers.append(arith.mulf(arith.extf(of, pairs), factors))
        return array(registers, (HALF, TILE), TURNED)

    return run(codes, along)


def largest(x: Array, *, interpret: Any) -> Array:
    """The largest magnitude of each row of :func:`products`, in float32."""
    narrow = x.dtype == jnp.float16
    if interpret:
        found = reference.largest_magnitude(x, 1)
    elif narrow:
        found = _largest_of_pairs(x)
    else:
        return jnp.max(jnp.abs(x), axis=1)
    return found * (1 / RAISED) if narrow else found


def encode(x: Array, scale: Array, *, interpret: Any) -> Array:
    """The codes of :func:`products`, one scale, a power of two, for each row; zero where that is infinite."""
    narrow, finite = x.dtype == jnp.float16, scale < jnp.inf
    if interpret:
        wide = x.astype(jnp.float32) * (1 / RAISED) if narrow else x
        return jnp.where(finite[:, None], reference.divide(wide, scale[:, None]), 0.0).astype(F8)
    # As in quantize.division: all reciprocals are normal numbers.
    inverse = lax.bitcast_convert_type((254 << 23) - lax.bitcast_convert_type(scale, jnp.int32), jnp.float32)
    if narrow:
        return _encode(x, (inverse * (1 / RAISED)).astype(jnp.float16))
    return _encode(x, inverse, jnp.where(finite, jnp.int32(-1), jnp.int32(0)))


def _encode(x: Array, inverse: Array, *keep: Array) -> Array:
    per_row = TURNED.reduce(1)

    @inline(
        arg_types=(TURNED, per_row, *[per_row] * len(keep)),
        return_type=plgpu.ShapeDtypeStruct((HALF, TILE), F8, layout=TURNED),
    )
    def run(ctx: Any, x: Any, inverse: Any, *keep: Any) -> Any:
        del ctx
        factors, *masks = ([scalar(register) for register in of.registers.flat] for of in (inverse, *keep))
        registers = []
        for number, register in enumerate(x.registers.flat):
            factor = factors[number % 2]
            if keep:
                quotients = arith.mulf(register, vector.broadcast(register.type, factor))
                words = [arith.andi(word, masks[0][number % 2]) for word in _codes_of_wide(parts_of(quotients))]
            else:
                both = llvm.inline_asm(i32(), [factor], "mov.b32 $0, {$1, $1};", "=r,h")
                words = _codes_of_pairs([_multiplied(pair, both) for pair in parts_of(words_of(register))])
            registers.append(of_words(words, ir.VectorType.get([8], ir.Float8E4M3FNType.get())))
        return array(registers, (HALF, TILE), TURNED)

    return run(x, inverse, *keep)


def _largest_of_pairs(x: Array) -> Array:
    layout = TURNED.reduce(1)

    @inline(arg_types=(TURNED,), return_type=plgpu.ShapeDtypeStruct((HALF,), jnp.float32, layout=layout))
    def run(ctx: Any, x: Any) -> Any:
        del ctx
        registers = list(x.registers.flat)
        made = []
        for row in range(2):
            words = [word for register in registers[row::2] for word in parts_of(words_of(register))]
            while len(words) > 1:
                words = [larger_magnitudes("float16", *pair) for pair in zip(words[::2], words[1::2], strict=True)]
            (word,) = words
            for distance in (1, 2):
                word = larger_magnitudes("float16", word, utils.shfl_bfly(word, distance))
            word = larger_magnitudes("float16", word, arith.shrui(word, integer(16)))
            half = arith.trunci(ir.IntegerType.get_signless(16), arith.andi(word, integer(0x7FFF)))
            wide = arith.extf(ir.F32Type.get(), arith.bitcast(ir.F16Type.get(), half))
            made.append(joined([wide]))
        return array(made, (HALF,), layout)

    return run(x)


def _widened(word: Any) -> list[Any]:
    """Words of two float16 numbers, of a word of four codes."""
    asm = "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 $0, %s; }"
    return [llvm.inline_asm(i32(), [word], asm % part, "=r,r") for part in ("low", "high")]


def _multiplied(a: Any, b: Any) -> Any:
    return llvm.inline_asm(i32(), [a, b], "mul.rn.f16x2 $0, $1, $2;", "=r,r,r")


def _codes_of_pairs(pairs: list[Any]) -> list[Any]:
    asm = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f16x2 low, $1; cvt.rn.satfinite.e4m3x2.f16x2 high, $2; "
        "mov.b32 $0, {low, high}; }"
    )
    return [llvm.inline_asm(i32(), pairs[first : first + 2], asm, "=r,r,r") for first in range(0, len(pairs), 2)]


def _codes_of_wide(numbers: list[Any]) -> list[Any]:
    asm = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high}; }"  # the second source of a conversion goes to the lower half
    )
    return [llvm.inline_asm(i32(), numbers[i : i + 4], asm, "=r,f,f,f,f") for i in range(0, len(numbers), 4)]
