"""The memory that caches lie in: pages of S tokens, for every layer the same ones."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.nn.block import Cache
from dsv3_jax.nn.cache import Pages
from pallas_kernels.quantize.reference import TILE


def empty_pages(
    config: ModelConfig, pages: int, page_size: int, dtype: DTypeLike, *, fp8: bool = False, drafting: bool = False
) -> Pages:
    """Zeros for ``pages`` pages of ``page_size`` tokens in each layer, page 0 of them for what belongs to nobody.

    A token takes :func:`~dsv3_jax.planning.flops.cache_elements_per_token` numbers: with MLA C + R a layer (spec 4.5),
    else keys and values.

    Args:
        config: the model.
        pages: in each layer.
        page_size: tokens of a page, S.
        dtype: of what is stored.
        fp8: store latents as float8_e4m3fn with a float32 scale for 128 numbers; rotated keys stay in ``dtype``, as in
            FlashMLA's layout (spec 4.5).
        drafting: one more layer behind the trunk's, of the first MTP module.

    Raises:
        ConfigError: FP8 is asked for and the model has no latents.
    """
    layers = config.num_hidden_layers + drafting
    if config.attention == "mla":
        first, second = (config.kv_lora_rank,), (config.qk_rope_head_dim,)
    elif fp8:
        raise ConfigError("cache_dtype = 'fp8' stores latents, and model.attention = 'mha' has none: take 'same'")
    else:
        first = second = (config.num_key_value_heads, config.head_dim)
    lead = (layers, pages, page_size)
    return Pages(
        jnp.zeros((*lead, *first), jnp.float8_e4m3fn if fp8 else dtype),
        jnp.zeros((*lead, *second), dtype),
        jnp.zeros((*lead, -(-first[0] // TILE)), jnp.float32) if fp8 else None,
    )


def contiguous_cache(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """A cache for ``batch`` sequences of up to ``slots`` tokens, each with one page of its own: for one's own loop."""
    table: Int[Array, "B X"] = jnp.arange(1, batch + 1, dtype=jnp.int32)[:, None]
    return Cache(empty_pages(config, batch + 1, slots, dtype), table)
