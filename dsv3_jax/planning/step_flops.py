"""Where a training step's arithmetic is, in closed form, for the share of a device's peak that each part reaches."""

from dsv3_jax.config import Config
from dsv3_jax.planning.flops import block_flops
from dsv3_jax.planning.parameters import count_parameters

_FORWARD_AND_BACKWARD = 3
_FLASH = 3.5
"""Attention without stored scores: two products forward, and five backward, one of them the scores again."""


def step_flops(config: Config) -> dict[str, float]:
    """Floating-point operations of one token, forward and backward, by part: ``attention``, ``expert GEMM``,
    ``dense GEMM``, ``routing`` and ``loss``.

    Attention's count its seven products over the positions that the causal mask leaves; recomputation that
    ``train.remat`` asks for is not counted. MTP is, where its loss is.
    """
    model, seq_len = config.model, config.train.seq_len
    depth = model.num_nextn_predict_layers
    counts = count_parameters(model)
    layers = model.num_hidden_layers + depth
    moe_layers = model.n_moe_layers + (depth if model.n_routed_experts else 0)
    _, attention = block_flops(model, seq_len, moe=not model.n_dense_layers)
    per_moe = 1 / max(1, model.n_moe_layers)
    linear = counts.attention / model.num_hidden_layers * layers
    linear += counts.dense_ffn + counts.shared_experts * per_moe * moe_layers + depth * 2 * model.hidden_size**2
    product = 2 * _FORWARD_AND_BACKWARD
    return {
        "attention": _FLASH * attention * layers,
        "expert GEMM": product * counts.routed_experts_active * per_moe * moe_layers,
        "dense GEMM": product * linear,
        "routing": product * counts.router * per_moe * moe_layers,
        "loss": product * counts.head_matrix * (1 + depth),
    }
