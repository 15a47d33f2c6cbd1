"""Settings of XLA and NCCL: for several devices, and under the user's own."""

import os
import subprocess
import sys

import pytest

from sharding.flags import BESIDE, ENVIRONMENT, XLA, apply_gpu_flags, compiler_options

GPUS = {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cuda"}


@pytest.mark.parametrize(("environment", "devices"), [(GPUS, 1), (GPUS | {"JAX_PLATFORMS": "cpu"}, 2)])
def test_one_device_needs_none_nor_do_processors(environment, devices):
    changed = dict(environment)
    assert apply_gpu_flags(changed, devices) == []
    assert changed == environment


def test_the_users_own_settings_win():
    own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp/x"
    environment = GPUS | {"XLA_FLAGS": own, "NCCL_NVLS_ENABLE": "1"}
    names = apply_gpu_flags(environment, 2)
    assert environment["NCCL_NVLS_ENABLE"] == "1"
    assert environment["XLA_FLAGS"] == own
    assert names == []
    again = dict(environment)
    assert apply_gpu_flags(again, 2) == []
    assert again == environment


def test_options_of_one_compilation_are_the_flags_as_values():
    assert compiler_options(1, beside=True) == {}
    assert compiler_options(2) == {"xla_gpu_enable_latency_hiding_scheduler": True}
    assert compiler_options(2, beside=True).keys() == {one.name for one in (*XLA, *BESIDE)}
    assert compiler_options(2, beside=True)["xla_gpu_experimental_parallel_collective_overlap_limit"] == 8


def test_every_setting_has_a_reason():
    assert all(len(one.reason) > 20 for one in (*XLA, *BESIDE, *ENVIRONMENT))


def test_xla_knows_every_flag():
    """It ends a process at the first one that it does not know."""
    environment = os.environ | GPUS | {"XLA_FLAGS": ""}
    assert len(apply_gpu_flags(environment, 2, beside=True)) >= len(XLA) + len(BESIDE)
    code = "import jax; print(len(jax.devices()))"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
