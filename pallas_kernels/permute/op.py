"""``permute`` and ``unpermute``: gathers in both directions, forward and backward; nothing is scattered or added.

The gradient of a gather is a scatter-add, slow and on GPUs not reproducible; since a plan knows both directions of
the permutation, every gradient here is a gather again.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from pallas_kernels import dispatch
from pallas_kernels.once import once
from pallas_kernels.permute import columns_sm90, gather_sm90
from pallas_kernels.permute.plan import Plan
from pallas_kernels.quantize.op import requantize_columns
from pallas_kernels.quantize.reference import TILE, Tiles


def _take_rows(rows: Array, index: Array) -> Array:
    """``rows[index]`` with zero rows where the index is ``len(rows)``, the mark of padding and dropped choices."""
    return rows.at[index].get(mode="fill", fill_value=0)


def _copy_rows(rows: Array, index: Array) -> Array:
    """:func:`_take_rows` in words of 32 bits: a thread of XLA's GPU kernel copies four elements of any size."""
    elements = 4 // rows.dtype.itemsize
    if elements < 2 or rows.shape[1] % elements:
        return _take_rows(rows, index)
    words = lax.bitcast_convert_type(rows.reshape(rows.shape[0], -1, elements), jnp.uint32)
    return lax.bitcast_convert_type(_take_rows(words, index), rows.dtype).reshape(index.shape[0], -1)


def _sum_choices(rows_MD: Array, plan: Plan, weights_TK: Array | None) -> Array:
    """Float32 sum over K of each token's rows, K gathers that fuse into one loop; weighted where weights are given."""
    terms = []
    for k in range(plan.row_of_pair_TK.shape[1]):
        row_TD = _take_rows(rows_MD, plan.row_of_pair_TK[:, k]).astype(jnp.float32)
        terms.append(row_TD if weights_TK is None else weights_TK[:, k, None].astype(jnp.float32) * row_TD)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@jax.custom_vjp
def _permute(x_TD: Array, plan: Plan) -> Array:
    return _copy_rows(x_TD, plan.token_of_row_M)


def _permute_fwd(x_TD: Array, plan: Plan) -> tuple[Array, Plan]:
    return _permute(x_TD, plan), plan


def _permute_bwd(plan: Plan, dy_MD: Array) -> tuple[Array, None]:
    return _sum_choices(dy_MD, plan, None).astype(dy_MD.dtype), None


_permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def _collect(y_MD: Array, plan: Plan) -> Array:
    return _sum_choices(y_MD, plan, None).astype(y_MD.dtype)


_collect.defvjp(
    lambda y_MD, plan: (_collect(y_MD, plan), plan),
    lambda plan, dout_TD: (_copy_rows(dout_TD, plan.token_of_row_M), None),
)


@jax.custom_vjp
def _unpermute(y_MD: Array, weights_TK: Array, plan: Plan) -> Array:
    return _sum_choices(y_MD, plan, weights_TK).astype(y_MD.dtype)


def _unpermute_fwd(y_MD: Array, weights_TK: Array, plan: Plan) -> tuple[Array, tuple[Array, Array, Plan]]:
    return _unpermute(y_MD, weights_TK, plan), (y_MD, weights_TK, plan)


def _unpermute_bwd(saved: tuple[Array, Array, Plan], dout_TD: Array) -> tuple[Array, Array, None]:
    y_MD, weights_TK, plan = saved
    weight_M = pairs_to_rows(weights_TK, plan).astype(jnp.float32)
    dout_MD = _take_rows(dout_TD, plan.token_of_row_M).astype(jnp.float32)
    dy_MD = weight_M[:, None] * dout_MD
    dw_M = jnp.sum(y_MD.astype(jnp.float32) * dout_MD, axis=1)
    return dy_MD.astype(y_MD.dtype), rows_to_pairs(dw_M, plan).astype(weights_TK.dtype), None


_unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)


@jax.named_scope("permute")
def permute(x_TD: Shaped[Array, "T D"], plan: Plan) -> Shaped[Array, "M D"]:
    """Copies each token's row to the places of its K choices; padding rows are exactly zero.

    The gradient of ``x_TD`` is the float32 sum over K of the rows' gradients, rounded once to their dtype.

    Raises:
        ValueError: the plan was made for another number of tokens.
    """
    if plan.row_of_pair_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(f"permute: the plan is for {plan.row_of_pair_TK.shape[0]} tokens, x_TD has {x_TD.shape[0]}")
    return _permute(x_TD, plan)


@jax.named_scope("permute")
def permute_tiles(tiles: Tiles, plan: Plan, *, implementation: dispatch.Implementation = "auto") -> Tiles:
    """The 1 x 128 tiles of :func:`permute`'s rows, from those of the tokens: ``q [M, D]``, ``scale [KB, M]``.

    A row's tiles are its own, so that this is :func:`permute` and a quantizer after it to the bit, but each token is
    quantized once, not once a choice, and half the bytes move. Padding rows have zero codes. It has no gradient.

    Args:
        tiles: of at least the plan's tokens; rows after those are zeros.
        plan: where the rows go.
        implementation: ``"xla"``, ``"pallas"`` (Hopper, D a multiple of 128) or ``"auto"``.

    Raises:
        ValueError: the plan was made for more tokens, or the implementation asked for cannot run.
    """
    token_M = plan.token_of_row_M
    _check_tokens("permute_tiles", tiles, plan)
    scale = tiles.scale.at[:, token_M].get(mode="fill", fill_value=1)
    obstacle = gather_sm90.obstacle(tiles.q, token_M)
    if dispatch.choose("permute_tiles", implementation, {"pallas": obstacle}) == "xla":
        return Tiles(_copy_rows(tiles.q, token_M), scale)
    return Tiles(once(gather_sm90.copy_rows)(tiles.q, token_M), scale)


@jax.named_scope("permute")
def permute_columns(tiles: Tiles, plan: Plan, *, implementation: dispatch.Implementation = "auto") -> Tiles:
    """The 128 x 1 tiles of :func:`permute_tiles`'s rows, from the tokens' tiles: ``q [D, M]``, ``scale [MB, D]``.

    It is :func:`permute_tiles` and :func:`~pallas_kernels.quantize.requantize_columns` with scales that are powers of
    two, to the bit, but the Hopper kernel writes no sorted rows. What it leaves undefined are the columns of blocks
    past ``plan.num_blocks``. It has no gradient.

    Args:
        tiles: of at least the plan's tokens; rows after those are zeros.
        plan: where the rows go.
        implementation: ``"xla"``, ``"pallas"`` (Hopper, D and blocks multiples of 128) or ``"auto"``.

    Raises:
        ValueError: the plan was made for more tokens, or the implementation asked for cannot run.
    """
    if _kernel_sorts("permute_columns", tiles, plan, implementation):
        return once(columns_sm90.permute_columns)(tiles, plan.token_of_row_M, _used(plan))
    return _columns_of(permute_tiles(tiles, plan, implementation=implementation), implementation)


@jax.named_scope("permute")
def permute_both(tiles: Tiles, plan: Plan, *, implementation: dispatch.Implementation = "auto") -> tuple[Tiles, Tiles]:
    """:func:`permute_tiles` and :func:`permute_columns`; the Hopper kernel reads tokens once and no sorted row.

    What it leaves undefined are rows and columns of blocks past ``plan.num_blocks``. Otherwise as those two.
    """
    if _kernel_sorts("permute_both", tiles, plan, implementation):
        return once(columns_sm90.permute_both)(tiles, plan.token_of_row_M, _used(plan))
    rows = permute_tiles(tiles, plan, implementation=implementation)
    return rows, _columns_of(rows, implementation)


def _kernel_sorts(name: str, tiles: Tiles, plan: Plan, implementation: dispatch.Implementation) -> bool:
    _check_tokens(name, tiles, plan)
    obstacle = columns_sm90.obstacle(tiles.q, plan.num_rows, plan.block)
    return dispatch.choose(name, implementation, {"pallas": obstacle}) == "pallas"


def _check_tokens(name: str, tiles: Tiles, plan: Plan) -> None:
    tokens = plan.row_of_pair_TK.shape[0]
    if tiles.q.shape[0] < tokens:
        raise ValueError(f"{name}: the plan is for {tokens} tokens, the tiles are of {tiles.q.shape[0]}")


def _used(plan: Plan) -> Array:
    """Blocks of 128 rows that hold any."""
    return plan.num_blocks * (plan.block // TILE)


def _columns_of(rows: Tiles, implementation: dispatch.Implementation) -> Tiles:
    return requantize_columns(*rows, power_of_two=True, implementation=implementation)


@jax.named_scope("permute")
def unpermute(y_MD: Float[Array, "M D"], weights_TK: Float[Array, "T K"] | None, plan: Plan) -> Float[Array, "T D"]:
    """``out[t] = sum_k weights[t, k] * y[row of (t, k)]``, summed in float32, in the dtype of ``y_MD``.

    Dropped choices add nothing, and their weights get a zero gradient. Padding rows of ``y_MD`` are never read.
    Without weights, rows are added as they are, and nothing of them is kept for the gradient.

    Raises:
        ValueError: rows or weights do not fit the plan.
    """
    weights = plan.row_of_pair_TK.shape if weights_TK is None else weights_TK.shape
    if y_MD.shape[0] != plan.num_rows or weights != plan.row_of_pair_TK.shape:
        raise ValueError(
            f"unpermute: the plan has {plan.num_rows} rows and weights {plan.row_of_pair_TK.shape}, "
            f"got {y_MD.shape[0]} and {weights}"
        )
    return _collect(y_MD, plan) if weights_TK is None else _unpermute(y_MD, weights_TK, plan)


@jax.named_scope("permute")
def pairs_to_rows(values_TK: Float[Array, "T K"], plan: Plan) -> Float[Array, " M"]:
    """One number of each (token, choice) at the place of its row; 0 for padding. It has no gradient."""
    return _take_rows(values_TK.reshape(-1), plan.pair_of_row_M)


@jax.named_scope("permute")
def rows_to_pairs(values_M: Float[Array, " M"], plan: Plan) -> Float[Array, "T K"]:
    """The way back of :func:`pairs_to_rows`, which is its transpose too; 0 for dropped choices."""
    return _take_rows(values_M, plan.row_of_pair_TK)
