"""Sorted rows and columns of tiles: in the interpreter with its races, lowered for Hopper, (-m gpu) on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.permute import columns_sm90, make_plan, permute_both, permute_columns, permute_tiles, rescale
from pallas_kernels.quantize import Tiles, quantize_rows, requantize_columns
from pallas_kernels.testing import spilled_bytes

RACES = plgpu.InterpretGPUParams(detect_races=True)
BLOCK = 128


def draw(tokens, dim, experts, choices, *, wild=True):
    """Tokens of very different sizes and a plan that leaves blocks without rows.

    The first 128 columns have scales up to 1, ``wild`` others larger ones too, and one number that is not finite.
    """
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((tokens, dim)) * np.exp2(rng.integers(-30, 6, (tokens, 1)))
    x *= np.exp2(rng.integers(-12, 1, (1, dim)))
    x[3] = 0
    if wild:
        x[:, 128:] *= 64
        x[tokens // 2, dim // 2] = np.inf
    chosen = np.stack([rng.permutation(experts + 1)[:choices] for _ in range(tokens)])
    chosen[chosen == 1] = experts  # nobody's, as those of 1 then
    plan = jax.jit(make_plan, static_argnums=(1, 2))(jnp.asarray(chosen, jnp.int32), experts, BLOCK)
    assert int(plan.num_blocks) < len(plan.group_of_block)
    return jax.jit(quantize_rows, static_argnums=1)(jnp.asarray(x, jnp.bfloat16), True), plan


def composed(tiles, plan):
    rows = permute_tiles(tiles, plan, implementation="xla")
    return rows, requantize_columns(*rows, power_of_two=True, implementation="xla")


def same(got, expected, plan):
    """The bits of rows and columns, up to the last block in use."""
    used = int(plan.num_blocks)
    for one, other in zip(got, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    (rows, columns), (of_rows, of_columns) = got, expected
    for a, b in (
        (rows.q[: used * BLOCK], of_rows.q[: used * BLOCK]),
        (rows.scale[:, : used * BLOCK], of_rows.scale[:, : used * BLOCK]),
        (columns.q[:, : used * BLOCK], of_columns.q[:, : used * BLOCK]),
        (columns.scale[:used], of_columns.scale[:used]),
    ):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_rows_and_columns_in_the_interpreter_are_those_of_two_steps_without_a_race():
    tiles, plan = draw(40, 256, 3, 2)
    assert list(np.asarray(rescale.fit(tiles.scale)).all(axis=1)) == [True, False]  # float16 and float32
    made = columns_sm90.permute_both(tiles, plan.token_of_row_M, plan.num_blocks, interpret=RACES)
    jax.block_until_ready(made)
    assert not gpu_callbacks.get_races().races_found
    same(made, jax.jit(composed)(tiles, plan), plan)


def test_what_the_kernel_cannot_take_is_said(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    tiles, plan = draw(40, 256, 3, 2)
    assert columns_sm90.obstacle(tiles.q, plan.num_rows, BLOCK) is None
    assert "float8_e4m3fn" in str(columns_sm90.obstacle(jnp.ones((5, 256)), plan.num_rows, BLOCK))
    assert "multiple of 128 numbers" in str(columns_sm90.obstacle(tiles.q[:, :192], plan.num_rows, BLOCK))
    assert "multiple of 128 rows" in str(columns_sm90.obstacle(tiles.q, plan.num_rows, 64))
    with pytest.raises(ValueError, match="permute_columns: the plan is for 40 tokens, the tiles are of 39"):
        permute_columns(Tiles(tiles.q[1:], tiles.scale[:, 1:]), plan)


@pytest.mark.parametrize("function", [permute_tiles, permute_columns, permute_both])
def test_the_kernels_lower_for_hopper(monkeypatch, function):
    tiles, plan = draw(200, 384, 3, 2)
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    lowered = jax.jit(lambda tiles, plan: function(tiles, plan)).trace(tiles, plan).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_codes_made_in_float16_are_those_of_float32_for_all_codes_and_all_scales_that_fit():
    codes = jnp.arange(256, dtype=jnp.uint8).view(jnp.float8_e4m3fn)
    codes = np.asarray(codes)[~np.isnan(np.asarray(codes, np.float32))]
    scales = np.exp2(np.arange(-30, 6)).astype(np.float32)
    fitting = scales[np.asarray(rescale.fit(jnp.asarray(scales)))]
    assert (fitting[0], fitting[-1], len(fitting)) == (rescale.SMALLEST, rescale.LARGEST, 23)
    assert not np.asarray(rescale.fit(jnp.asarray([0.75, jnp.inf, jnp.nan]))).any()
    for scale in fitting:
        narrow = codes.astype(np.float16) * np.float16(scale * rescale.RAISED)
        wide = codes.astype(np.float32) * scale
        np.testing.assert_array_equal(narrow.astype(np.float32), wide * rescale.RAISED)
        for column in fitting:
            here = np.abs(wide) <= 448 * column
            got = narrow[here] * np.float16(1 / (column * rescale.RAISED))
            expected = (wide[here] / column).astype(codes.dtype)
            np.testing.assert_array_equal(got.astype(codes.dtype).view(np.uint8), expected.view(np.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("shape", [(1000, 128, 5, 3), (1000, 768, 5, 3), (8192, 7168, 8, 4), (16384, 2048, 64, 6)])
def test_rows_and_columns_on_hopper_are_those_of_two_steps(shape, wild):
    tiles, plan = draw(*shape, wild=wild)
    small = np.asarray(rescale.fit(tiles.scale)).all(axis=1)
    assert small[0] or shape[1] == 128
    assert wild != small[1:].all() or shape[1] == 128
    expected = jax.jit(composed)(tiles, plan)
    both = jax.jit(lambda tiles, plan: permute_both(tiles, plan, implementation="pallas"))(tiles, plan)
    columns = jax.jit(lambda tiles, plan: permute_columns(tiles, plan, implementation="pallas"))(tiles, plan)
    same(both, expected, plan)
    same((both[0], columns), expected, plan)


PROGRAM = """
import jax
import jax.numpy as jnp
from pallas_kernels.permute import columns_sm90
from pallas_kernels.quantize import Tiles


def run(tiles, index, used):
    return [getattr(columns_sm90, f"permute_{form}")(tiles, index, used) for form in ("columns", "both")]


tiles = Tiles(jnp.ones((64, 2048), jnp.float8_e4m3fn), jnp.ones((16, 64)))
jax.block_until_ready(jax.jit(run)(tiles, jnp.zeros(256, jnp.int32), jnp.int32(2)))
"""


@pytest.mark.gpu
def test_no_kernel_spills_registers():
    assert spilled_bytes(PROGRAM) == [0] * 2
