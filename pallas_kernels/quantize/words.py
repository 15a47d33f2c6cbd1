"""Numbers of 16 bits in the Hopper kernels, two in a 32-bit word.

The compiler takes pairs of such numbers apart and joins them again, several instructions a pair, wherever it sees them
one by one. Here they stay words: of a pair, each is widened with one instruction and the larger magnitudes of two pairs
are found with one; largest magnitudes of two rows travel between threads in one word.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mlir import i32, integer, joined, larger_magnitudes, of_words, parts_of, scalar, words_of


def widened(x: Array, *, layout: Any) -> Array:
    """``x`` in float32."""
    name = jnp.dtype(x.dtype).name

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
    def run(ctx: Any, *arrays: Any) -> Any:
        del ctx
        return arrays[0]._pointwise(
            lambda register: joined([half for word in _words(register) for half in _halves(name, word)])
        )

    return run(x)


def largest_of_rows(x: Array, *, layout: Any) -> Array:
    """The largest magnitude of each row of ``x [..., n]`` in float32; NaN where one is."""
    name, shape = jnp.dtype(x.dtype).name, x.shape[:-1]
    returned = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout.reduce(len(shape)))

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=returned)
    def run(ctx: Any, *arrays: Any) -> Any:
        del ctx
        (x,) = arrays
        rows = [_tree(name, [word for part in row for word in _words(part)]) for row in _rows(x)]
        count, found = len(rows), []
        rows += rows[-1:] * (count % 2)
        for a, b in zip(rows[::2], rows[1::2], strict=True):
            word = larger_magnitudes(name, _permuted(a, b, 0x5410), _permuted(a, b, 0x7632))
            for distance in _distances(x.layout):
                word = larger_magnitudes(name, word, utils.shfl_bfly(word, distance))
            found += _halves(name, arith.andi(word, integer(0x7FFF7FFF)))
        return _of_rows(x, found[:count])

    return run(x)


def codes_of_rows(
    quotient: Callable[..., Any], x: Array, factors: list[Array], keep: Array, *, layout: Any, codes_layout: Any
) -> Array:
    """The e4m3 codes of ``quotient(x, *factors)``, and 0 where ``keep`` is, which is 0 or -1.

    ``quotient`` takes float32 registers; ``factors`` and ``keep`` are those of rows. ``codes_layout`` has as many or
    twice as many neighbours a thread as ``layout``, of the same rows and columns.
    """
    name, shape = jnp.dtype(x.dtype).name, x.shape
    of_row = layout.reduce(1)
    returned = plgpu.ShapeDtypeStruct(shape, jnp.float8_e4m3fn, layout=codes_layout)

    @plgpu.inline_mgpu(arg_types=(layout, of_row, *[of_row] * len(factors)), return_type=returned)
    def run(ctx: Any, x: Any, keep: Any, *factors: Any) -> Any:
        del ctx
        made = []
        for row, mask, *scalars in zip(_rows(x), *map(_scalars, (keep, *factors)), strict=True):
            numbers = [half for part in row for word in _words(part) for half in _halves(name, word)]
            codes = _codes([quotient(number, *scalars) for number in numbers])
            made.append([arith.andi(word, mask) for word in codes])
        layout, f8 = codes_layout.to_mgpu(), ir.Float8E4M3FNType.get()
        of_register = layout.vector_length // 4
        registers = np.empty(layout.registers_shape(shape), object)
        for row, at in zip(made, _row_indices(layout, registers.shape), strict=True):
            parts = [row[i : i + of_register] for i in range(0, len(row), of_register)]
            for index, part in zip(at, parts, strict=True):
                registers[index] = vector.bitcast(ir.VectorType.get([layout.vector_length], f8), joined(part))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(x, keep, *factors)


def e5m6_values(low: Array, high: Array, half: int, *, layout: Any) -> Array:
    """Codes as the float16 numbers they are part of: ``low`` has bits 4 to 11, a half of ``high`` the four above."""
    returned = plgpu.ShapeDtypeStruct(low.shape, jnp.float16, layout=layout)
    mask, distance = (0x00F000F0, 8) if half else (0x000F000F, 12)

    def numbers(low: Any, high: Any) -> Any:
        made = []
        for word, above in zip(_words(low), _words(high), strict=True):
            for selector in (0x4140, 0x4342):  # two bytes, each with zeros above
                bits, upper = (_permuted(of, integer(0), selector) for of in (word, above))
                upper = arith.shli(arith.andi(upper, integer(mask)), integer(distance))
                made.append(arith.ori(arith.shli(bits, integer(4)), upper))
        return of_words(made, ir.VectorType.get([2 * len(made)], ir.F16Type.get()))

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=returned)
    def run(ctx: Any, *arrays: Any) -> Any:
        del ctx
        low, high = arrays
        registers = np.empty(low.registers.shape, object)
        for at in np.ndindex(registers.shape):
            registers[at] = numbers(low.registers[at], high.registers[at])
        return mgpu.FragmentedArray(_registers=registers, _layout=low.layout, _is_signed=None)

    return run(low, high)


def _row_indices(layout: Any, registers: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """The indices of each row's registers, of a thread that holds some of the rows, in the order of columns."""
    of_columns = layout.tiling.tile_dimension(len(layout.base_tile_shape) - 1)
    rows = np.ndindex(*(1 if column else size for column, size in zip(of_columns, registers, strict=True)))
    columns = list(np.ndindex(*(size if column else 1 for column, size in zip(of_columns, registers, strict=True))))
    return [[tuple(map(sum, zip(row, column, strict=True))) for column in columns] for row in rows]


def _rows(x: Any) -> list[list[Any]]:
    return [[x.registers[at] for at in row] for row in _row_indices(x.layout, x.registers.shape)]


def _scalars(per_row: Any) -> list[Any]:
    return [scalar(register) for register in per_row.registers.flat]


def _of_rows(x: Any, values: list[Any]) -> Any:
    layout = x.layout.reduce((len(x.shape) - 1,))
    registers = np.empty(layout.registers_shape(x.shape[:-1]), object)
    registers.flat[:] = [joined([value]) for value in values]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _distances(layout: Any) -> list[int]:
    """Between lanes that hold a row together: those of a butterfly."""
    of_columns = layout.tiling.tile_dimension(len(layout.base_tile_shape) - 1)
    sizes, stride, found = layout.tiled_tiling_shape, 1, []
    for lane_dim in layout.lane_dims[::-1]:
        size = sizes[lane_dim]
        if of_columns[lane_dim]:
            found += [stride << bit for bit in range(size.bit_length() - 1)]
        stride *= size
    return found


def _words(value: Any) -> list[Any]:
    return parts_of(words_of(value))


def _halves(name: str, word: Any) -> list[Any]:
    """Both numbers of a word in float32."""
    f32 = ir.F32Type.get()
    if name == "bfloat16":
        bits = arith.shli(word, integer(16)), arith.andi(word, integer(0xFFFF0000))
        return [arith.bitcast(f32, each) for each in bits]
    pair = vector.bitcast(ir.VectorType.get([2], ir.F16Type.get()), joined([word]))
    return [arith.extf(f32, half) for half in parts_of(pair)]


def _tree(name: str, words: list[Any]) -> Any:
    while len(words) > 1:
        paired = [larger_magnitudes(name, a, b) for a, b in zip(words[::2], words[1::2], strict=False)]
        words = paired + words[len(paired) * 2 :]
    return words[0]


def _permuted(a: Any, b: Any, selector: int) -> Any:
    return llvm.inline_asm(i32(), [a, b, integer(selector)], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,n")


def _codes(numbers: list[Any]) -> list[Any]:
    """Four codes a word."""
    i16 = ir.IntegerType.get_signless(16)
    asm = "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;"  # the second source goes to the lower half
    pairs = [llvm.inline_asm(i16, list(pair), asm, "=h,f,f") for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    words = [vector.bitcast(ir.VectorType.get([1], i32()), joined(pairs[i : i + 2])) for i in range(0, len(pairs), 2)]
    return [scalar(word) for word in words]
