"""Expert balance: V3's sequence-wise loss, V2's three losses, the bias update, MaxVio (spec 6).

Losses are averaged over sequences; the model sums them over layers (DEFAULT of spec 6.2). The load ``f`` is a count
and has no gradient; gradient flows through the mean affinity ``P``.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.config import LossConfig
from dsv3_jax.nn.router import Routing


def load_fraction(experts_BTK: Int[Array, "B T K"], n_experts: int) -> Float[Array, "B E"]:
    """``f_i = E / (K T) * (tokens that chose i)``, a sequence at a time; sums to E."""
    tokens, chosen = experts_BTK.shape[1:]
    hits_BTKE = experts_BTK[..., None] == jnp.arange(n_experts)
    return jnp.sum(hits_BTKE, axis=(1, 2), dtype=jnp.float32) * (n_experts / (chosen * tokens))


def sequence_balance(routing: Routing, indicator: str = "affinity") -> Float[Array, ""]:
    """``sum_i f_i P_i`` with affinities normalized over experts (V3 eqs 17-20); 1 in balance.

    ``affinity`` counts the top-K of the raw affinities, as printed; ``selected`` the experts really chosen.
    """
    scores_BTE = routing.scores
    experts_BTK = routing.experts
    if indicator == "affinity":
        experts_BTK = lax.top_k(lax.stop_gradient(scores_BTE), experts_BTK.shape[-1])[1]
    f_BE = load_fraction(experts_BTK, scores_BTE.shape[-1])
    p_BE = jnp.mean(scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True), axis=1)
    return jnp.mean(jnp.sum(f_BE * p_BE, axis=-1))


def expert_balance(routing: Routing) -> Float[Array, ""]:
    """V2's expert-level ``sum_i f_i P_i`` over the chosen experts and plain affinities (V2 eqs 23-25)."""
    f_BE = load_fraction(routing.experts, routing.scores.shape[-1])
    return jnp.mean(jnp.sum(f_BE * jnp.mean(routing.scores, axis=1), axis=-1))


def device_balance(routing: Routing, devices: int) -> Float[Array, ""]:
    """V2's device-level ``sum_g f'_g P'_g``: mean load and summed affinity of each device's experts (V2 eqs 26-28)."""
    batch, _, n_experts = routing.scores.shape
    f_BE = load_fraction(routing.experts, n_experts)
    f_BX = jnp.mean(f_BE.reshape(batch, devices, -1), axis=-1)
    p_BX = jnp.sum(jnp.mean(routing.scores, axis=1).reshape(batch, devices, -1), axis=-1)
    return jnp.mean(jnp.sum(f_BX * p_BX, axis=-1))


def communication_balance(routing: Routing, devices: int, devices_per_token: int) -> Float[Array, ""]:
    """V2's communication ``sum_g f''_g P''_g``: share of tokens sent to each device (V2 eqs 29-31)."""
    batch, tokens, n_experts = routing.scores.shape
    device_BTK = routing.experts // (n_experts // devices)
    sent_BTX = jnp.any(device_BTK[..., None] == jnp.arange(devices), axis=2)
    f_BX = jnp.sum(sent_BTX, axis=1, dtype=jnp.float32) * (devices / (devices_per_token * tokens))
    p_BX = jnp.sum(jnp.mean(routing.scores, axis=1).reshape(batch, devices, -1), axis=-1)
    return jnp.mean(jnp.sum(f_BX * p_BX, axis=-1))


@jax.named_scope("router")
def balance_loss(routing: Routing, loss: LossConfig) -> Float[Array, ""]:
    """All balance losses of one router that ``loss`` asks for, each times its alpha, float32."""
    total = jnp.zeros((), jnp.float32)
    if loss.sequence_balance:
        total += loss.sequence_balance * sequence_balance(routing, loss.balance_indicator)
    if loss.expert_balance:
        total += loss.expert_balance * expert_balance(routing)
    if loss.device_balance:
        total += loss.device_balance * device_balance(routing, loss.balance_devices)
    if loss.communication_balance:
        total += loss.communication_balance * communication_balance(
            routing, loss.balance_devices, loss.devices_per_token
        )
    return total


def update_bias(
    bias: Float[Array, "*L E"], counts: Int[Array, "*L E"], gamma: Float[Array, ""] | float, rule: str = "sign"
) -> Float[Array, "*L E"]:
    """``b + gamma * sign(mean - count)``, from the counts of the whole step (LFB algorithm 1, spec 6.1).

    ``error`` replaces the sign by the error as a share of the mean load.
    """
    counts = counts.astype(jnp.float32)
    mean = jnp.mean(counts, axis=-1, keepdims=True)
    error = jnp.sign(mean - counts) if rule == "sign" else (mean - counts) / jnp.maximum(mean, 1.0)
    return bias + gamma * error


def relative_load(counts: Int[Array, "*L E"]) -> Float[Array, "*L E"]:
    """Each expert's load over the balanced load; 1 everywhere in balance."""
    counts = counts.astype(jnp.float32)
    return counts / jnp.maximum(jnp.mean(counts, axis=-1, keepdims=True), 1e-9)


def max_violation(counts: Int[Array, "*L E"]) -> Float[Array, ""]:
    """MaxVio: ``(max load - mean load) / mean load``, averaged over routers (LFB eq 4)."""
    return jnp.mean(jnp.max(relative_load(counts), axis=-1)) - 1.0
