"""Text generation is tested with programs that run for milliseconds."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass
