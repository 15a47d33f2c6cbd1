"""The Hopper kernel: in the interpreter with its race detector, lowered for Hopper, and (-m gpu) on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import cases, paged_attention, pallas_sm90, reference, schedule
from pallas_kernels.paged_attention.cases import Case
from pallas_kernels.testing import assert_close, spilled_bytes

DIVIDED = Case("divided", (130, 1, 64), 1, 8, 256)
DRAFTED = Case("drafted", (66, 4, 130), 4, 3, 256, spare=2)
TWO_TILES = Case("two_tiles", (100, 260), 2, 48, 256, page=128)
WIDE = Case("wide", (65, 130), 1, 16)
RAGGED = Case("ragged", (5000, 1, 64, 65, 63, 1027, 2, 700, 128, 4096), 1, 128)


def arrays_of(case):
    """In bfloat16; what is behind a sequence's last token in its last page is infinite or no number."""
    *floats, table, first = case.arrays()
    for b, length in enumerate(case.lengths):
        if length % case.page:
            behind = table[b, length // case.page], slice(length % case.page, None)
            floats[2][behind], floats[3][behind] = np.inf, np.nan
    return [jnp.asarray(a, jnp.bfloat16) for a in floats], jnp.asarray(table), jnp.asarray(first)


def check_against_reference(got, floats, table, first, scale):
    assert got.dtype == jnp.bfloat16
    wide = (a.astype(jnp.float32) for a in floats)
    assert_close(got, reference.paged_attention(*wide, table, first, None, scale=scale))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("case", "sm_count"),
    [
        (DIVIDED, 3),
        pytest.param(DRAFTED, 4, marks=pytest.mark.slow),
        pytest.param(TWO_TILES, 6, marks=pytest.mark.slow),
        pytest.param(WIDE, 1, marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_results_in_the_interpreter_equal_the_definition_without_a_race(case, sm_count):
    floats, table, first = arrays_of(case)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    got = pallas_sm90.paged_attention(*floats, table, first, scale=0.02, sm_count=sm_count, interpret=interpret)
    jax.block_until_ready(got)
    assert not gpu_callbacks.get_races().races_found
    check_against_reference(got, floats, table, first, 0.02)


@pytest.mark.parametrize("parts", [1, 2, 7, 132])
def test_a_schedule_gives_every_block_to_one_part_and_divides_at_most_the_ends_of_a_part(parts):
    rng = np.random.default_rng(parts)
    lengths = rng.integers(1, 3000, 17)
    start, work = map(np.asarray, schedule.divided(jnp.asarray(lengths - 1), 1, 40, parts))
    count = np.minimum(-(-lengths // 64), 40)
    np.testing.assert_array_equal(start, np.cumsum([0, *count]))
    seen = np.zeros(start[-1], int)
    for first, end, low, high in work:
        assert high - low <= -(-start[-1] // parts)
        for b in range(first, end):
            begin, behind = max(low, start[b]), min(high, start[b + 1])
            assert begin < behind
            assert b in (first, end - 1) or (begin, behind) == (start[b], start[b + 1])
            seen[begin:behind] += 1
    np.testing.assert_array_equal(seen, 1)


def avals_of(case, batch=8):
    floats = [(batch, case.queries, case.heads, case.latent), (batch, case.queries, case.heads, case.rope)]
    floats += [(99, case.page, case.latent), (99, case.page, case.rope)]
    integers = [(batch, 16), (batch,)]
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in floats] + [
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in integers
    ]


def test_the_kernels_lower_for_hopper_and_fit_in_its_shared_memory(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    by_name = functools.partial(paged_attention, scale=0.1, implementation="pallas")
    lowered = jax.jit(by_name).trace(*avals_of(cases.V3))
    assert lowered.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 5}, "at most 4 queries a sequence, got 5"),
        ({"latent": 384}, "C must be a multiple of 256 up to 512 and R 64, got 384 and 64"),
        ({"rope": 32}, "R 64, got 512 and 32"),
        ({"page": 16}, "pages must have a multiple of 64 tokens, got 16"),
    ],
)
def test_what_the_kernel_cannot_do_is_named(monkeypatch, change, message):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)
    arguments = {"queries": 1, "heads": 2, **change}
    floats, table, first = arrays_of(Case("small", (9, 20), **arguments))
    with pytest.raises(ValueError, match=f"'pallas' cannot run: .*{message}"):
        paged_attention(*floats, table, first, scale=1.0, implementation="pallas")
    with pytest.raises(ValueError, match="it takes bfloat16"):
        paged_attention(*(a.astype(jnp.float32) for a in floats), table, first, scale=1.0, implementation="pallas")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "queries", "heads"),
    [
        (RAGGED.lengths, 1, 128),
        (RAGGED.lengths, 2, 16),
        (RAGGED.lengths, 4, 20),
        (RAGGED.lengths, 3, 64),
        ((9,), 1, 16),
        ((4,) * 200, 4, 16),
        ((20000, 7), 1, 64),
    ],
)
def test_results_on_hopper_equal_the_definition(lengths, queries, heads):
    case = Case("case", tuple(max(length, queries) for length in lengths), queries, heads)
    floats, table, first = arrays_of(case)
    op = jax.jit(functools.partial(paged_attention, scale=0.02, implementation="pallas"))
    got = op(*floats, table, first)
    check_against_reference(got, floats, table, first, 0.02)
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(op(*floats, table, first)), np.asarray(got))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [TWO_TILES, WIDE, DRAFTED], ids=lambda case: case.name)
def test_other_pages_and_latents_on_hopper_equal_the_definition(case):
    floats, table, first = arrays_of(case)
    op = jax.jit(functools.partial(paged_attention, scale=0.02, implementation="pallas"))
    check_against_reference(op(*floats, table, first), floats, table, first, 0.02)


@pytest.mark.gpu
def test_no_kernel_spills_more_than_one_register():
    program = (
        "import jax, jax.numpy as jnp\n"
        "from pallas_kernels.paged_attention.pallas_sm90 import paged_attention\n"
        "for t, n in ((1, 16), (2, 16), (1, 64), (1, 128), (2, 128)):\n"
        "    q = [jnp.zeros((2, t, n, c), jnp.bfloat16) for c in (512, 64)]\n"
        "    pages = [jnp.zeros((9, 64, c), jnp.bfloat16) for c in (512, 64)]\n"
        "    table, first = jnp.zeros((2, 4), jnp.int32), jnp.array([70, 3], jnp.int32)\n"
        "    jax.block_until_ready(paged_attention(*q, *pages, table, first, scale=1.0))\n"
    )
    spilled = spilled_bytes(program)
    assert len(spilled) >= 10  # each attends and combines; what JAX itself compiles on the way may come with them
    assert max(spilled) <= 12  # at 2 x 128 rows one number, stored once before the loops
