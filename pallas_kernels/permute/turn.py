"""What the Hopper kernel that permutes codes and turns them around says to the compiler instruction by instruction.

Codes of rows come by index, 16 bytes a thread, eight threads a row, into ``ROWS``. They leave for shared memory with
each row's eight pieces of 16 bytes in an order of its own, and come back transposed, in ``TURNED``: ``ldmatrix.trans``
moves pairs of neighbours, which a byte permutation then parts, so that codes need not be widened to be transposed. The
rows that one instruction takes are chosen so that a thread gets eight neighbours of a column.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mlir import i32, integer, joined, of_words, scalar, words_of
from pallas_kernels.quantize.reference import TILE
from pallas_kernels.quantize.tile_loop import F8, swizzled

HALF = TILE // 2

inline: Any = plgpu.inline_mgpu  # what it decorates takes a context that its callers do not give

ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 128), (4, 128), (16,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
"""``[16 n, 128]``: eight threads hold a row, 16 neighbours a thread."""

TURNED = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 32), (16, 32), (2, 8))), warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-1
)
"""``[64 n, 32 k]``: four threads hold two rows, eight neighbours of each a thread."""

SWIZZLED = swizzled(F8)
"""Of shared memory that TMA copies from."""

LINE = plgpu.Layout.WG_STRIDED((TILE,), vec_size=1)
"""``[128]``: one a thread."""


def load_line(index_ref: Any, *, interpret: Any) -> Array:
    """128 indices, one a thread. Pallas takes two loads of the same numbers for one, with one layout."""
    if interpret:
        return index_ref[...]

    @inline(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((TILE,), jnp.int32, layout=LINE))
    def run(ctx: Any, ref: Any) -> Any:
        del ctx
        place = arith.muli(arith.remui(utils.thread_idx(), integer(TILE)), integer(4))
        return array([llvm.load(ir.VectorType.get([1], i32()), pointer(ref, place))], (TILE,), LINE, signed=True)

    return run(index_ref)


def gather_rows(codes_ref: Any, index: Array, *, interpret: Any) -> Array:
    """``[128, 128]`` codes in ``ROWS``: rows of ``codes_ref`` ``[T, 128]``, zeros where the index is not below T."""
    count = codes_ref.shape[0]
    if interpret:
        found = codes_ref[...].at[index].get(mode="fill", fill_value=0)
        return jnp.where((index < count)[:, None], found, jnp.zeros((), F8))

    returned = plgpu.ShapeDtypeStruct((TILE, TILE), F8, layout=ROWS)

    @inline(arg_types=(plgpu.RefType(), ROWS.reduce(1)), return_type=returned)
    def run(ctx: Any, ref: Any, index: Any) -> Any:
        del ctx
        (stride, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
        lane = arith.remui(utils.thread_idx(), integer(8))
        base = pointer(ref, arith.muli(lane, integer(16)))
        registers = [_load_if_below(count, scalar(number), base, stride) for number in index.registers.flat]
        return array(registers, (TILE, TILE), ROWS)

    return run(codes_ref, index)


def gather_scales(scale_ref: Any, index: Array, *, interpret: Any) -> Array:
    """``[128]`` scales, one a thread: those of ``scale_ref`` ``[T]``, 1 where the index is not below T."""
    count = scale_ref.shape[0]
    if interpret:
        return jnp.where(index < count, scale_ref[...].at[index].get(mode="fill", fill_value=1), 1.0)

    returned = plgpu.ShapeDtypeStruct((TILE,), jnp.float32, layout=LINE)

    @inline(arg_types=(plgpu.RefType(), LINE), return_type=returned)
    def run(ctx: Any, ref: Any, index: Any) -> Any:
        del ctx
        number = scalar(index.registers.flat[0])
        asm = (
            "{ .reg .pred there; setp.lt.u32 there, $2, " + str(count) + "; mov.f32 $0, 0f3F800000; "
            "@there ld.global.f32 $0, [$1]; }"
        )
        value = llvm.inline_asm(
            ir.F32Type.get(), [_element(pointer(ref), number, 4), number], asm, "=&f,l,r", has_side_effects=True
        )
        return array([joined([value])], (TILE,), LINE)

    return run(scale_ref, index)


def put_rows(buffer: Any, codes: Array, *, interpret: Any) -> None:
    """Writes ``[128, 128]`` codes in ``ROWS`` to shared memory, in an order that only :func:`take_turned` knows."""
    if interpret:
        buffer[...] = codes
        return

    @inline(arg_types=(plgpu.RefType(), ROWS), return_type=())
    def run(ctx: Any, ref: Any, codes: Any) -> Any:
        del ctx
        warp, lane = _warp_and_lane()
        within = arith.addi(arith.muli(warp, integer(4)), arith.divui(lane, integer(8)))
        piece = arith.remui(lane, integer(8))
        for number, register in enumerate(codes.registers.flat):
            row = arith.addi(integer(16 * number), within)
            # Of the eight rows that one transposed matrix is made of, two are neighbours, the next eight apart.
            pair = arith.remui(arith.divui(row, integer(8)), integer(4))
            key = arith.addi(arith.muli(pair, integer(2)), arith.remui(row, integer(2)))
            place = arith.addi(arith.muli(row, integer(TILE)), arith.muli(arith.xori(piece, key), integer(16)))
            llvm.store(words_of(register), pointer(ref, place), alignment=16)
        return ()

    run(buffer, codes)


def take_turned(buffer: Any, half: int, *, interpret: Any) -> Array:
    """``[64, 128]`` codes in ``TURNED``: the transpose of 64 columns of what :func:`put_rows` wrote."""
    if interpret:
        return buffer[...].T[half * HALF : (half + 1) * HALF]

    @inline(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((HALF, TILE), F8, layout=TURNED))
    def run(ctx: Any, ref: Any) -> Any:
        del ctx
        warp, lane = _warp_and_lane()
        matrix, key = arith.divui(lane, integer(8)), arith.remui(lane, integer(8))
        row = _sum(
            arith.muli(arith.divui(key, integer(2)), integer(8)),
            arith.muli(matrix, integer(2)),
            arith.remui(key, integer(2)),
        )
        piece = arith.xori(arith.addi(warp, integer(4 * half)), key)
        place = arith.addi(arith.muli(row, integer(TILE)), arith.muli(piece, integer(16)))
        registers = []
        for first in range(0, TILE, 32):
            words = _load_transposed(pointer(ref, arith.addi(place, integer(first * TILE))))
            registers += [_codes([_bytes(words[i], words[i + 1], of) for i in (0, 2)]) for of in (0x6420, 0x7531)]
        return array(registers, (HALF, TILE), TURNED)

    return run(buffer)


def put_turned(buffer: Any, half: int, codes: Array, *, interpret: Any) -> None:
    """Writes codes in ``TURNED`` to 64 rows of a ``[128, 128]`` buffer that is ``SWIZZLED``."""
    if interpret:
        buffer[half * HALF : (half + 1) * HALF, :] = codes
        return

    @inline(arg_types=(plgpu.RefType(SWIZZLED), TURNED), return_type=())
    def run(ctx: Any, ref: Any, codes: Any) -> Any:
        del ctx
        warp, lane = _warp_and_lane()
        pair, part = arith.divui(lane, integer(4)), arith.remui(lane, integer(4))
        first = arith.addi(arith.muli(warp, integer(16)), arith.muli(pair, integer(2)))
        for number, register in enumerate(codes.registers.flat):
            row = arith.addi(first, integer(half * HALF + number % 2))
            piece = arith.addi(integer(2 * (number // 2)), arith.divui(part, integer(2)))
            place = _sum(
                arith.muli(row, integer(TILE)),
                arith.muli(arith.xori(piece, arith.remui(row, integer(8))), integer(16)),
                arith.muli(arith.remui(part, integer(2)), integer(8)),
            )
            llvm.store(words_of(register), pointer(ref, place), alignment=8)
        return ()

    run(buffer, codes)


def _warp_and_lane() -> tuple[Any, Any]:
    thread = utils.thread_idx()
    return arith.remui(arith.divui(thread, integer(32)), integer(4)), arith.remui(thread, integer(32))


def _sum(*terms: Any) -> Any:
    return functools.reduce(arith.addi, terms)


def _load_if_below(count: int, number: Any, base: Any, stride: int) -> Any:
    asm = (
        "{ .reg .pred there; setp.lt.u32 there, $5, " + str(count) + "; "
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@there ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )
    four = llvm.StructType.get_literal([i32()] * 4)
    words = llvm.inline_asm(
        four, [_element(base, number, stride), number], asm, "=&r,=&r,=&r,=&r,l,r", has_side_effects=True
    )
    return _codes([llvm.extractvalue(i32(), words, [i]) for i in range(4)])


def _load_transposed(pointer: Any) -> list[Any]:
    four = llvm.StructType.get_literal([i32()] * 4)
    asm = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
    address = llvm.ptrtoint(i32(), pointer)
    words = llvm.inline_asm(four, [address], asm, "=r,=r,=r,=r,r,~{memory}", has_side_effects=True)
    return [llvm.extractvalue(i32(), words, [i]) for i in range(4)]


def _bytes(low: Any, high: Any, selected: int) -> Any:
    return llvm.inline_asm(i32(), [low, high], f"prmt.b32 $0, $1, $2, {selected};", "=r,r,r")


def _codes(words: list[Any]) -> Any:
    return of_words(words, ir.VectorType.get([4 * len(words)], ir.Float8E4M3FNType.get()))


def array(registers: list[Any], shape: tuple[int, ...], layout: Any, signed: bool | None = None) -> Any:
    """Registers in the order of their layout as an array."""
    of = layout.to_mgpu()
    held = np.empty(len(registers), dtype=object)
    held[:] = registers
    return mgpu.FragmentedArray(_registers=held.reshape(of.registers_shape(shape)), _layout=of, _is_signed=signed)


def _element(base: Any, number: Any, stride: int) -> Any:
    """The pointer ``number`` times ``stride`` bytes after ``base``."""
    i64 = ir.IntegerType.get_signless(64)
    return _after(base, arith.muli(arith.extui(i64, number), arith.constant(i64, stride)))


def pointer(ref: Any, place: Any = None) -> Any:
    """The pointer to the byte ``place`` of a buffer."""
    start = utils.memref_ptr(ref)
    return start if place is None else _after(start, place)


def _after(pointer: Any, place: Any) -> Any:
    return utils.getelementptr(pointer, [place], ir.IntegerType.get_signless(8))
