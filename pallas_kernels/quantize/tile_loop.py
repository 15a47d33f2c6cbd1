"""What the Hopper kernels share that bring 128 x 128 tiles of their inputs to shared memory (TMA).

Thread blocks stay on their SM and walk over the tiles, those along the last dim first. Each has a few input tiles in
flight: the copy that refills a stage starts when the tile that was in it is done.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, varying
from pallas_kernels.quantize.reference import TILE

F8 = jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What is tuned.

    Attributes:
        rows: rows that a thread block of the row-wise kernels takes at a time, a multiple of 8.
        stages: input tiles in flight in shared memory, in the kernels that transpose.
        blocks_per_sm: thread blocks that share an SM, in the kernels that transpose.
    """

    rows: int = 64
    stages: int = 2
    blocks_per_sm: int = 2


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile of the walk, and what is in shared memory for it."""

    mb: Any
    kb: Any
    slot: Any
    staged: Mapping[str, Any]
    kept: Mapping[str, Any]
    full: Any

    @property
    def rows(self) -> Any:
        """The tile's rows in global memory."""
        return pl.ds(self.mb * TILE, TILE)

    @property
    def columns(self) -> Any:
        """The tile's columns in global memory."""
        return pl.ds(self.kb * TILE, TILE)

    def fetch(self, source: Any, name: str) -> None:
        """Starts copying ``source`` to this tile's stage of the buffer ``name``."""
        plgpu.copy_gmem_to_smem(source, self.staged[name].at[self.slot], self.full.at[self.slot])

    def smem(self, name: str) -> Any:
        """This tile's stage of the buffer ``name``."""
        return self.staged[name].at[self.slot]


def swizzled(dtype: Any) -> tuple[Any, Any]:
    """The layout of a shared-memory tile whose rows are cut into 128-byte pieces."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]


def smem_tile(dtype: Any, stages: int | None = None) -> Any:
    """A 128 x 128 buffer in shared memory, or one for each of ``stages``."""
    lead = () if stages is None else (stages,)
    return plgpu.SMEM((*lead, TILE, TILE), jnp.dtype(dtype), transforms=swizzled(dtype))


def tiles_of(rows: int, dim_k: int) -> list[jax.ShapeDtypeStruct]:
    """Codes and scales of ``rows`` rows."""
    return [jax.ShapeDtypeStruct((rows, dim_k), F8), jax.ShapeDtypeStruct((dim_k // TILE, rows), jnp.float32)]


def walk(
    operands: Sequence[Array],
    out_type: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, int],
    staged: Mapping[str, Any],
    kept: Mapping[str, Any],
    fetch: Callable[..., None],
    work: Callable[..., None],
    tiling: Tiling,
    barriers: bool = False,
    sm_count: int = dispatch.HOPPER_SM_COUNT,
    interpret: Any = None,
) -> list[Array]:
    """Runs ``work(tile, *operand_refs, *out_refs)`` on every tile of ``grid``.

    ``work`` ends with ``send``, or ``barriers`` is set: only then is everyone done with a stage that is filled again.

    Args:
        operands: arrays in global memory.
        out_type: shapes and dtypes of the results.
        grid: tiles along the rows and along the columns.
        staged: buffers of the inputs, with a leading dim of ``tiling.stages``.
        kept: other buffers.
        fetch: ``fetch(tile, *operand_refs, *out_refs)`` starts one copy to each staged buffer.
        work: what is done with a tile once they are full.
        tiling: stages and thread blocks for each SM are taken from it.
        barriers: whether Pallas puts one before and after every store. Without, ``work`` commits what it leaves in
            shared memory before another thread reads it, and global memory is written only.
        sm_count: streaming multiprocessors.
        interpret: parameters of the interpreter; None compiles for the GPU.
    """
    num_tiles, stages = grid[0] * grid[1], tiling.stages
    num_blocks = min(sm_count * tiling.blocks_per_sm, num_tiles)

    def body(*refs: Any, full: Any, **buffers: Any) -> None:
        block = lax.axis_index("block")

        def tile_at(index: Any, slot: Any) -> Tile:
            staged_refs = {name: buffers[name] for name in staged}
            kept_refs = {name: buffers[name] for name in kept}
            return Tile(lax.div(index, grid[1]), lax.rem(index, grid[1]), slot, staged_refs, kept_refs, full)

        def fetch_if_any(index: Any, slot: Any) -> None:
            @pl.when(index < num_tiles)
            def _() -> None:
                fetch(tile_at(index, slot), *refs)

        for stage in range(stages):
            fetch_if_any(block + stage * num_blocks, jnp.int32(stage))

        @plgpu.nd_loop((num_tiles,), collective_axes="block")
        def _(info: plgpu.NDLoopInfo) -> None:
            index, slot = info.index[0], lax.rem(info.local_index, stages)
            plgpu.barrier_wait(full.at[slot])
            work(tile_at(index, slot), *refs)
            fetch_if_any(index + stages * num_blocks, slot)

        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=list(out_type),
        scratch_types={**staged, **kept, "full": plgpu.Barrier(num_arrivals=len(staged), num_barriers=stages)},
        grid=(num_blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=not barriers),
        interpret=interpret,
    )
    return [varying.like(made, *operands) for made in kernel(*operands)]


OUTBOX = {"q": smem_tile(F8), "scale": plgpu.SMEM((TILE,), jnp.float32)}
"""Buffers of ``send``."""


def send(tile: Tile, q: Array, scale: Array, to_q: Any, to_scale: Any) -> None:
    """Stores a tile of codes and its row of scales through shared memory; everyone is done with the inputs after."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tile.kept["q"][...] = q
    tile.kept["scale"][...] = scale
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile.kept["q"], to_q)
    plgpu.copy_smem_to_gmem(tile.kept["scale"], to_scale)
