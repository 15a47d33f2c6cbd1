"""Tests marked gpu or slow are left out unless asked for, and gpu tests fail, not skip, where there is no GPU."""

import warnings
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PLANTED = """
import pytest

def test_plain():
    pass

@pytest.mark.slow
def test_slow():
    pass

@pytest.mark.gpu
def test_gpu():
    pass
"""


@pytest.fixture
def planted(pytester, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers =\n  gpu: x\n  slow: x\n")
    pytester.makepyfile(PLANTED)
    return pytester


def test_marked_tests_are_left_out_with_the_reason_shown(planted):
    result = planted.runpytest_subprocess()
    result.assert_outcomes(passed=1, deselected=2)
    result.stdout.fnmatch_lines(["left out: tests marked gpu, which need an NVIDIA GPU; run them with -m gpu"])


def test_slow_tests_run_when_asked_for(planted):
    planted.runpytest_subprocess("-m", "slow").assert_outcomes(passed=1, deselected=2)


def test_gpu_tests_fail_loudly_without_a_gpu(planted):
    result = planted.runpytest_subprocess("-m", "gpu")
    result.assert_outcomes(errors=1, deselected=2)
    result.stdout.fnmatch_lines(["*-m gpu needs an NVIDIA GPU and JAX's CUDA package; JAX sees*cpu*"])


def _warn_from(module):
    exec("import warnings; warnings.warn('made up', FutureWarning)", {"__name__": module})


@pytest.mark.parametrize("module", ["dsv3_jax", "dsv3_jax.nn.made_up", "sharding.made_up", "pallas_kernels"])
def test_what_our_own_packages_warn_about_is_an_error(module):
    with pytest.raises(FutureWarning, match="made up"):
        _warn_from(module)


def test_what_others_warn_about_is_not():
    with warnings.catch_warnings(record=True) as caught:
        _warn_from("dsv3_jax_plugin.of_somebody_else")
    assert len(caught) == 1
