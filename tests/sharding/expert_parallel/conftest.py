"""Programs that run for milliseconds are compiled quickly.

JAX is imported within the fixture: pytest may read this file before tests/conftest.py has set the devices.
"""

import pytest


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
