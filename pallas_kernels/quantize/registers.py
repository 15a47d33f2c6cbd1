"""What the Hopper kernels tell the compiler about values in registers, instruction by instruction."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mlir import PAIR, i32, of_words, parts_of, scalar, words_of
from pallas_kernels.quantize.reference import round_to


def round_16(x: Array, dtype: Any, *, layout: Any, interpret: Any) -> Array:
    """Float32 ``x`` in ``layout``, an even number of neighbours a thread, as bfloat16 or float16.

    Two values an instruction. What is widened again is otherwise converted one by one, on a unit that takes eight
    cycles for a warp.
    """
    if interpret:
        return round_to(x, dtype).astype(dtype)
    name = jnp.dtype(dtype).name
    return _pointwise(functools.partial(_round_pairs, name), dtype, layout, x)


def hide_16(x: Array, *, layout: Any, interpret: Any) -> Array:
    """``x`` of 16 bits, which the compiler cannot know: it widens it again instead of keeping 32 bits from before."""
    return x if interpret else _pointwise(_move, x.dtype, layout, x)


def sigmoid(x: Array, *, layout: Any, interpret: Any) -> Array:
    """Of float32 ``x`` in ``layout``.

    The compiler's exponential and an approximate reciprocal, but the exponential's last product, which a power of two
    makes exact, and the sum with 1 are one instruction. A kernel's own ``1 / y`` has seven instructions more, which
    keep it right where ``y`` is above 2 ** 126: there, for ``x`` below -87.3, this is 0, that not yet.
    """
    return 1.0 / (1.0 + jnp.exp(-x)) if interpret else _pointwise(_sigmoid, jnp.float32, layout, x)


def e4m3_where(keep: Array, x: Array, *, layout: Any) -> Array:
    """The e4m3 codes of float32 ``x`` in ``layout``, an even number of neighbours a thread, and 0 where ``keep`` is.

    ``keep`` is 0 or -1, the same for all neighbours of a thread: one instruction for four codes, not one a value.
    """
    return _pointwise(_kept_codes, jnp.float8_e4m3fn, layout, x, keep)


def approximate_reciprocal(value: Any) -> Any:
    """Of float32 registers, at most one unit in the last place off; 0 where it would be no normal number."""
    if not isinstance(value.type, ir.VectorType):
        return llvm.inline_asm(value.type, [value], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
    return vector.from_elements(value.type, [approximate_reciprocal(part) for part in parts_of(value)])


def _sigmoid(value: Any) -> Any:
    if isinstance(value.type, ir.VectorType):
        return vector.from_elements(value.type, [_sigmoid(part) for part in parts_of(value)])
    # exp(-x) = 2^n 2^f: n + 127 in the last bits of ``n`` (kept in range), f = -x log2(e) - n in two steps.
    asm = """{
        .reg .b32 n, f;
        fma.rn.sat.f32 n, $1, 0fBBBB989D, 0f3F000000;
        fma.rm.f32 n, n, 0f437C0000, 0f4B400001;
        add.rn.f32 f, n, 0fCB40007F;
        neg.f32 f, f;
        fma.rn.f32 f, $1, 0fBFB8AA3B, f;
        fma.rn.f32 f, $1, 0fB2A57060, f;
        ex2.approx.ftz.f32 f, f;
        shl.b32 n, n, 23;
        fma.rn.f32 f, f, n, 0f3F800000;
        rcp.approx.ftz.f32 $0, f;
    }"""
    return llvm.inline_asm(value.type, [value], asm, "=f,f")


def _pointwise(function: Callable[..., Any], dtype: Any, layout: Any, *arrays: Array) -> Array:
    returned = plgpu.ShapeDtypeStruct(arrays[0].shape, dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(arrays), return_type=returned)
    def run(ctx: Any, first: Any, *rest: Any) -> Any:
        del ctx
        return first._pointwise(function, *rest)

    return run(*arrays)


def _round_pairs(name: str, value: Any) -> Any:
    to = {"bfloat16": ir.BF16Type, "float16": ir.F16Type}[name].get()
    parts = parts_of(value)
    asm = f"cvt.rn.{PAIR[name]}.f32 $0, $2, $1;"  # the second source goes to the lower half
    pairs = zip(parts[::2], parts[1::2], strict=True)
    words = [llvm.inline_asm(i32(), [low, high], asm, "=r,f,f") for low, high in pairs]
    return of_words(words, ir.VectorType.get([len(parts)], to))


def _kept_codes(value: Any, keep: Any) -> Any:
    parts, i16 = parts_of(value), ir.IntegerType.get_signless(16)
    asm = "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;"  # the second source goes to the lower half
    pairs = [llvm.inline_asm(i16, list(pair), asm, "=h,f,f") for pair in zip(parts[::2], parts[1::2], strict=True)]
    words = vector.from_elements(ir.VectorType.get([len(pairs)], i16), pairs)
    mask, size = scalar(keep), len(pairs)
    if size % 2:
        mask = arith.trunci(i16, mask)
    else:
        size //= 2
        words = vector.bitcast(ir.VectorType.get([size], i32()), words)
    kept = arith.andi(words, vector.broadcast(words.type, mask))
    return vector.bitcast(ir.VectorType.get([len(parts)], ir.Float8E4M3FNType.get()), kept)


def _move(value: Any) -> Any:
    words = parts_of(words_of(value))
    moved = [llvm.inline_asm(i32(), [word], "mov.b32 $0, $1;", "=r,r", has_side_effects=True) for word in words]
    return of_words(moved, value.type)
