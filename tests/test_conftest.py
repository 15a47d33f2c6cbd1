"""Tests marked gpu or slow are left out unless asked for, and gpu tests fail, not skip, where there is no GPU."""

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
