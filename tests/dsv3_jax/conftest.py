"""JAX is imported within the fixture: pytest may read this file before tests/conftest.py has set the devices."""

import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that run for milliseconds: half the compile time is worth more than their speed."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
