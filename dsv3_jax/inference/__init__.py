"""Text from a model: the paged cache, the engine that serves many requests, generation and drafted tokens."""

from dsv3_jax.inference.engine import Engine, EngineOptions, News
from dsv3_jax.inference.generate import generate, generate_text
from dsv3_jax.inference.pages import contiguous_cache, empty_pages
from dsv3_jax.inference.sequence import Sampling, Sequence

__all__ = [
    "Engine",
    "EngineOptions",
    "News",
    "Sampling",
    "Sequence",
    "contiguous_cache",
    "empty_pages",
    "generate",
    "generate_text",
]
