"""What comes after a pipeline's last layer, with its gradients: final norm, MTP and heads.

Embedding and head are the largest matrices that a rank has. What a micro-batch adds to their gradients goes straight
into the step's sums, part by part, so that no second array of their size is made.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model import DeepSeekV3, Tree
from dsv3_jax.train.loss import Losses, balance_of, cross_entropy_gradients, head_targets, total_balance
from sharding.zero import wide

_LARGE = ("embedding", "head")


def add_end_gradients(
    model_of: Callable[[Tree], DeepSeekV3],
    params: Tree,
    grads: Tree,
    raw: Float[Array, "B T D"],
    tokens: Int[Array, "B T1"],
    config: Config,
    *,
    mtp_weight: Float[Array, ""],
    label_total: Float[Array, ""],
    sequence_total: Float[Array, ""],
) -> tuple[Tree, Losses, Float[Array, "B T D"]]:
    """:func:`~dsv3_jax.train.loss.end_losses` of one micro-batch with its gradients.

    Args:
        model_of: the model without the pipeline's layers, of a tree like ``params``.
        params: embedding, final norm, head and MTP, in the products' types.
        grads: a tree of the same form, float32, that the gradients are added to.
        raw: the trunk's output.
        tokens: the micro-batch; padding is negative.
        config: the run.
        mtp_weight: keyword argument of ``end_losses``, as are ``label_total`` and ``sequence_total``.

    Returns:
        ``grads`` with this micro-batch's added, the losses, and the gradient of ``raw``.
    """
    ids, table = jnp.maximum(tokens, 0), params["embedding"]["table"]
    targets = head_targets(tokens, label_total, 1 + config.model.num_nextn_predict_layers)
    large = {name: part for name, part in params.items() if name in _LARGE}
    small = wide({name: part for name, part in params.items() if name not in _LARGE})
    embedded = [table[ids[:, depth:]].astype(raw.dtype) for depth in range(1, len(targets))]

    def states_of(small: Tree, raw: Array, embedded: list[Array]) -> tuple[tuple[list[Array], Array], Array | None]:
        states = model_of(large | small).ending(
            raw, ids, balance=balance_of(config), remat=config.train.remat, embedded=embedded
        )
        balance, counts = total_balance(states.aux, tokens.shape[0] / sequence_total, len(embedded), mtp_weight)
        return ([states.main, *states.mtp], balance), counts

    (states, balance), back, counts = jax.vjp(states_of, small, raw, embedded, has_aux=True)
    weights = [jnp.float32(1), *[mtp_weight / max(1, len(embedded))] * len(embedded)]
    head, d_head = _head(params), _head(grads)
    d_states, losses = [], []
    for state, target, weight in zip(states, targets, weights, strict=True):
        loss, d_state, d_head = cross_entropy_gradients(state, head, target, config.train.loss_chunk, weight, d_head)
        d_states.append(d_state)
        losses.append(loss)
    d_small, d_raw, d_embedded = back((d_states, jnp.ones_like(balance)))
    main, mtp = losses[0], sum(losses[1:], jnp.float32(0)) / max(1, len(embedded))
    d_large = _with_head(grads, d_head)
    d_table = d_large["embedding"]["table"]
    for depth, d_rows in enumerate(d_embedded, start=1):
        d_table = d_table.at[ids[:, depth:]].add(d_rows.astype(d_table.dtype))
    d_large["embedding"] = {"table": d_table}
    added = jax.tree.map(jnp.add, {name: grads[name] for name in small}, d_small)
    return d_large | added, Losses(main + mtp_weight * mtp + balance, main, mtp, balance, counts), d_raw


def _head(params: Tree) -> Array:
    return params["head"]["kernel"] if "head" in params else params["embedding"]["table"].T


def _with_head(grads: Tree, d_head: Array) -> Tree:
    """The two large gradients, the head's in its place."""
    if "head" in grads:
        return {"embedding": grads["embedding"], "head": {"kernel": d_head}}
    return {"embedding": {"table": d_head.T}}
