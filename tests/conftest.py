"""Every test sees eight virtual CPU devices; tests marked gpu or slow run only when -m asks for them."""

import os
import sys

import pytest

OPT_IN = ("gpu", "slow")


def _asked_for(config: pytest.Config) -> set[str]:
    expression = config.getoption("markexpr") or ""
    return {name for name in OPT_IN if name in expression and f"not {name}" not in expression}


def pytest_configure(config: pytest.Config) -> None:
    assert "jax" not in sys.modules, "jax was imported before its devices were set"
    # What a command compiles in one test, in this process or in one that it starts, no other finds.
    os.environ["DSV3_COMPILE_CACHE"] = "off"
    if "gpu" not in _asked_for(config):
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_NUM_CPU_DEVICES"] = "8"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = set(OPT_IN) - _asked_for(config)
    out = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if out:
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=out)


def pytest_report_header(config: pytest.Config) -> list[str]:
    reasons = {"gpu": "need an NVIDIA GPU", "slow": "take minutes"}
    left_out = [name for name in OPT_IN if name not in _asked_for(config)]
    return [f"left out: tests marked {name}, which {reasons[name]}; run them with -m {name}" for name in left_out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import jax

        kinds = [device.device_kind for device in jax.devices()]
        if jax.default_backend() != "gpu":
            pytest.fail(f"-m gpu needs an NVIDIA GPU and JAX's CUDA package; JAX sees {kinds}", pytrace=False)
