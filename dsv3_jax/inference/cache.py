"""The cache of a model's trunk: with MLA one latent and one rotated key a token and layer, nothing per head."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import Cache
from dsv3_jax.nn.attention import LayerCache


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """Zeros for ``batch`` sequences of up to ``slots`` tokens, a :class:`LayerCache` a stack with a leading layer dim.

    With MLA [L, B, S, C] and [L, B, S, R] (spec 4.5), else keys and values [L, B, S, N', H]; in all
    :func:`~dsv3_jax.planning.flops.cache_elements_per_token` numbers a token.
    """
    if config.attention == "mla":
        first, second = (config.kv_lora_rank,), (config.qk_rope_head_dim,)
    else:
        first = second = (config.num_key_value_heads, config.head_dim)
    layers = {"dense": config.n_dense_layers, "moe": config.n_moe_layers}
    return {
        name: LayerCache(*(jnp.zeros((count, batch, slots, *shape), dtype) for shape in (first, second)))
        for name, count in layers.items()
        if count
    }
