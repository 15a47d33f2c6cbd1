"""What the Hopper kernels tell the compiler about 16-bit values in registers, instruction by instruction."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantize.reference import round_to

_PTX = {"bfloat16": "bf16x2", "float16": "f16x2"}


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


def _pointwise(function: Callable[..., Any], dtype: Any, layout: Any, *arrays: Array) -> Array:
    returned = plgpu.ShapeDtypeStruct(arrays[0].shape, dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(arrays), return_type=returned)
    def run(ctx: Any, first: Any, *rest: Any) -> Any:
        del ctx
        return first._pointwise(function, *rest)

    return run(*arrays)


def _round_pairs(name: str, value: Any) -> Any:
    to = {"bfloat16": ir.BF16Type, "float16": ir.F16Type}[name].get()
    parts = _parts(value)
    asm = f"cvt.rn.{_PTX[name]}.f32 $0, $2, $1;"  # the second source goes to the lower half
    pairs = zip(parts[::2], parts[1::2], strict=True)
    words = [llvm.inline_asm(_i32(), [low, high], asm, "=r,f,f") for low, high in pairs]
    return _from_words(words, ir.VectorType.get([len(parts)], to))


def _move(value: Any) -> Any:
    (size,) = ir.VectorType(value.type).shape
    words = _parts(vector.bitcast(ir.VectorType.get([size // 2], _i32()), value))
    moved = [llvm.inline_asm(_i32(), [word], "mov.b32 $0, $1;", "=r,r", has_side_effects=True) for word in words]
    return _from_words(moved, value.type)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _parts(value: Any) -> list[Any]:
    (size,) = ir.VectorType(value.type).shape
    return [vector.extract(value, dynamic_position=[], static_position=[i]) for i in range(size)]


def _from_words(words: list[Any], to: Any) -> Any:
    return vector.bitcast(to, vector.from_elements(ir.VectorType.get([len(words)], _i32()), words))
