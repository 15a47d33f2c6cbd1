"""Text from a model: the cache, the sampler, the generation loop."""

from dsv3_jax.inference.cache import empty_cache
from dsv3_jax.inference.generate import generate, generate_text
from dsv3_jax.inference.sampler import sample

__all__ = ["empty_cache", "generate", "generate_text", "sample"]
