"""Text from a model: the cache, the sampler, the generation loop, and models from run folders."""

from dsv3_jax.inference.cache import empty_cache
from dsv3_jax.inference.generate import generate, generate_text
from dsv3_jax.inference.load import Run, load_run
from dsv3_jax.inference.sampler import sample

__all__ = ["Run", "empty_cache", "generate", "generate_text", "load_run", "sample"]
