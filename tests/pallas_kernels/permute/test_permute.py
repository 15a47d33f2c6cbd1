"""Permutation: the plan, both directions, their gradients, and what the compiled program holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.permute import make_plan, num_blocks_bound, permute, permute_tiles, reference, unpermute
from pallas_kernels.quantize import quantize_rows

CASES = {  # name: (T, K, E, block, drop)
    "usual": (37, 3, 8, 4, False),
    "block_of_one": (9, 2, 5, 1, False),
    "some_dropped": (29, 4, 6, 8, True),
    "one_token": (1, 2, 4, 16, False),
    "one_expert": (11, 1, 1, 4, False),
    "most_experts_empty": (6, 2, 40, 4, True),
}


plan_of = jax.jit(make_plan, static_argnums=(1, 2))


def draw(name, *, seed=0):
    tokens, choices, experts, block, drop = CASES[name]
    rng = np.random.default_rng(seed)
    idx = np.stack([rng.permutation(experts + drop)[:choices] for _ in range(tokens)]).astype(np.int32)
    x = rng.standard_normal((tokens, 6)).astype(np.float32)
    weights = rng.random((tokens, choices)).astype(np.float32)
    return idx, x, weights, experts, block


@pytest.fixture(params=CASES)
def case(request):
    return draw(request.param)


def test_rows_are_expert_sorted_stable_and_padded_with_exact_zeros(case):
    idx, x, _, experts, block = case
    plan = plan_of(idx, experts, block)
    assert plan.num_rows == num_blocks_bound(idx.size, experts, block) * block
    expected = reference.permute(x, idx, experts, block, plan.num_rows)
    np.testing.assert_array_equal(jax.jit(permute)(x, plan), expected)


@pytest.mark.parametrize("columns", [8, 5])
def test_rows_of_two_bytes_a_number_are_copied_bit_for_bit(columns):
    idx, _, _, experts, block = draw("usual")
    bits = np.random.default_rng(1).integers(0, 1 << 16, (len(idx), columns), np.uint16)
    plan = plan_of(idx, experts, block)
    rows = jax.jit(permute)(bits.view(jnp.bfloat16), plan)
    expected = reference.permute(bits, idx, experts, block, plan.num_rows)
    np.testing.assert_array_equal(np.asarray(rows).view(np.uint16), expected)


def test_counts_blocks_and_positions_agree_with_each_other(case):
    idx, _, _, experts, block = case
    plan = plan_of(idx, experts, block)
    counts = np.bincount(idx.ravel(), minlength=experts + 1)[:experts]
    np.testing.assert_array_equal(plan.counts_E, counts)
    blocks = -(-counts // block)
    assert int(plan.num_blocks) == blocks.sum() <= len(plan.group_of_block)
    np.testing.assert_array_equal(plan.group_of_block[: blocks.sum()], np.repeat(np.arange(experts), blocks))
    assert set(np.asarray(plan.group_of_block[blocks.sum() :])) <= {experts - 1}

    row_of_pair, pair_of_row = np.asarray(plan.row_of_pair_TK).ravel(), np.asarray(plan.pair_of_row_M)
    kept = idx.ravel() < experts
    np.testing.assert_array_equal(row_of_pair[~kept], plan.num_rows)
    np.testing.assert_array_equal(pair_of_row[row_of_pair[kept]], np.flatnonzero(kept))
    assert (pair_of_row == idx.size).sum() == plan.num_rows - kept.sum()
    np.testing.assert_array_equal(np.asarray(plan.group_of_block)[row_of_pair[kept] // block], idx.ravel()[kept])


def test_the_bound_suffices_and_is_reached_in_the_worst_case():
    experts, block = 4, 8
    idx = np.repeat(np.arange(experts), [1, 9, 17, 1]).astype(np.int32)[:, None]
    plan = plan_of(idx, experts, block)
    assert int(plan.num_blocks) == len(plan.group_of_block) == 7


def test_a_promise_of_fewer_kept_pairs_shortens_the_plan_and_changes_nothing_else():
    idx, x, _, experts, block = draw("some_dropped")
    kept = int((idx < experts).sum())
    plan = plan_of(idx, experts, block)
    short = jax.jit(make_plan, static_argnums=(1, 2, 3))(idx, experts, block, kept)
    assert kept < idx.size
    assert short.num_rows == num_blocks_bound(kept, experts, block) * block < plan.num_rows
    np.testing.assert_array_equal(permute(jnp.asarray(x), short), permute(jnp.asarray(x), plan)[: short.num_rows])
    np.testing.assert_array_equal(short.row_of_pair_TK, np.where(idx < experts, plan.row_of_pair_TK, short.num_rows))


def mixture(x, weights, scale, plan):
    rows = permute(x, plan)
    rows = rows * jnp.repeat(scale[plan.group_of_block], plan.block)[:, None]
    return unpermute(rows, weights, plan)


def test_unpermute_of_scaled_rows_is_the_mixture(case):
    idx, x, weights, experts, block = case
    scale = np.linspace(0.5, 2.0, experts).astype(np.float32)
    plan = plan_of(idx, experts, block)
    out = jax.jit(mixture)(x, weights, scale, plan)
    np.testing.assert_allclose(out, reference.moe(x, idx, weights, scale), rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_the_plain_mixture(case):
    idx, x, weights, experts, block = case
    scale = jnp.linspace(0.5, 2.0, experts)
    target = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    plan = plan_of(idx, experts, block)

    def plain(x, weights, scale):
        factor = jnp.where(idx < experts, scale[np.minimum(idx, experts - 1)], 0.0)
        return jnp.vdot((weights * factor).sum(1, keepdims=True) * x, target)

    ours = jax.grad(lambda x, w, s: jnp.vdot(mixture(x, w, s, plan), target), argnums=(0, 1, 2))
    theirs = jax.grad(plain, argnums=(0, 1, 2))
    arguments = (jnp.asarray(x), jnp.asarray(weights), scale)
    for got, expected in zip(jax.jit(ours)(*arguments), jax.jit(theirs)(*arguments), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_padding_rows_never_reach_the_output_or_the_gradients():
    idx, x, weights, experts, block = draw("some_dropped")
    plan = plan_of(idx, experts, block)
    padding = np.asarray(plan.pair_of_row_M) == idx.size
    assert padding.any()
    rows = jnp.where(padding[:, None], jnp.nan, permute(jnp.asarray(x), plan))
    out, back = jax.vjp(lambda y, w: unpermute(y, w, plan), rows, jnp.asarray(weights))
    d_rows, d_weights = back(jnp.ones_like(out))
    assert np.isfinite(out).all()
    assert np.isfinite(d_weights).all()
    np.testing.assert_array_equal(d_rows[padding], 0.0)
    np.testing.assert_array_equal(np.asarray(d_weights)[idx == experts], 0.0)


def test_bfloat16_sums_are_accumulated_in_float32_and_rounded_once():
    tokens, choices = 16, 8
    idx = jnp.asarray(np.tile(np.arange(choices, dtype=np.int32), (tokens, 1)))
    plan = plan_of(idx, choices, 4)
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((plan.num_rows, 5)), jnp.bfloat16)
    weights = jnp.asarray(rng.random((tokens, choices)), jnp.float32)
    picked = np.asarray(rows, np.float32)[np.asarray(plan.row_of_pair_TK)]
    out = unpermute(rows, weights, plan)
    assert out.dtype == jnp.bfloat16
    expected = jnp.asarray((np.asarray(weights)[..., None] * picked).sum(1)).astype(jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=1e-6)
    dx = jax.vjp(lambda x: permute(x, plan), jnp.zeros((tokens, 5), jnp.bfloat16))[1](rows)[0]
    expected = jnp.asarray(picked.sum(1)).astype(jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(dx, np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=1e-6)


def test_no_activation_is_scattered_forward_or_backward():
    idx, x, weights, experts, block = draw("usual")

    def loss(x, weights, idx):
        plan = make_plan(idx, experts, block)
        return jnp.sum(unpermute(permute(x, plan) ** 2, weights, plan) ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, weights, idx))
    scatters = [line for line in text.splitlines() if "= scatter" in line]
    assert scatters, "the one int32 inverse permutation is expected to be a scatter"
    assert all(line.split("=")[0].strip().split(":")[1].startswith("i32") for line in scatters), scatters


def test_wrong_sizes_are_one_clear_line():
    idx, x, weights, experts, block = draw("usual")
    plan = plan_of(idx, experts, block)
    with pytest.raises(ValueError, match="the plan is for 37 tokens, x_TD has 36"):
        permute(jnp.asarray(x[1:]), plan)
    with pytest.raises(ValueError, match="unpermute: the plan has"):
        unpermute(jnp.zeros((3, 6)), jnp.asarray(weights), plan)
    with pytest.raises(ValueError, match="must be at least 1"):
        make_plan(jnp.asarray(idx), experts, 0)


@pytest.mark.parametrize("rows_beyond", [0, 5])
def test_permuted_tiles_are_the_permuted_rows_quantized(rows_beyond):
    idx, _, _, experts, block = draw("some_dropped")
    plan = plan_of(idx, experts, block)
    x = np.random.default_rng(3).standard_normal((len(idx), 200)).astype(np.float32)
    padded = np.pad(x, ((0, rows_beyond), (0, 0)))

    @jax.jit
    def both(x, padded):
        return permute_tiles(quantize_rows(padded, True), plan), quantize_rows(permute(x, plan), True)

    found, expected = both(x, padded)
    used = np.asarray(plan.pair_of_row_M) < idx.size
    np.testing.assert_array_equal(found.q, expected.q)
    np.testing.assert_array_equal(found.scale[:, used], expected.scale[:, used])
    assert np.isfinite(found.scale).all()


def test_tiles_of_too_few_tokens_are_refused():
    idx, _, _, experts, block = draw("usual")
    tiles = quantize_rows(jnp.ones((len(idx) - 1, 8)))
    with pytest.raises(ValueError, match="the plan is for 37 tokens, the tiles are of 36"):
        permute_tiles(tiles, plan_of(idx, experts, block))
