"""The choice of an implementation."""

import logging

import pytest

from pallas_kernels import dispatch


def test_auto_takes_the_first_implementation_without_an_obstacle():
    assert dispatch.choose("op", "auto", {"cudnn": "no", "pallas": None}) == "pallas"


def test_auto_takes_xla_where_everything_else_has_an_obstacle():
    assert dispatch.choose("op", "auto", {"pallas": "odd shape"}) == "xla"


def test_xla_may_always_be_asked_for():
    assert dispatch.choose("op", "xla", {"pallas": None}) == "xla"


def test_an_implementation_asked_for_by_name_that_cannot_run_raises_one_line():
    with pytest.raises(ValueError, match=r"^op: implementation 'pallas' cannot run: K is odd$"):
        dispatch.choose("op", "pallas", {"pallas": "K is odd"})


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^op: unknown implementation 'cuda'; choose one of 'auto', 'xla', 'pallas'$"):
        dispatch.choose("op", "cuda", {"pallas": None})


def test_a_fallback_on_a_gpu_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch.jax, "default_backend", lambda: "gpu")
    dispatch._say_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch.choose("op", "auto", {"pallas": "K is odd"}) == "xla"
    assert [record.getMessage() for record in caplog.records] == [
        "op runs its XLA implementation on this GPU: pallas: K is odd"
    ]


def test_no_fallback_is_said_on_a_cpu(monkeypatch, caplog):
    monkeypatch.setattr(dispatch.jax, "default_backend", lambda: "cpu")
    with caplog.at_level(logging.WARNING):
        dispatch.choose("op", "auto", {"pallas": "not a GPU"})
    assert not caplog.records


def test_a_program_can_be_made_for_a_device_that_is_not_here():
    before = dispatch.platform()
    with dispatch.compiling_for(dispatch.Target("gpu", "9.0")):
        assert dispatch.platform() == "gpu"
        assert dispatch.hopper_obstacle() is None
        with dispatch.compiling_for(dispatch.Target("gpu", "8.0")):
            assert dispatch.hopper_obstacle() == "the GPU has compute capability 8.0, not 9.0"
    assert dispatch.platform() == before
    assert dispatch.hopper_obstacle() == "the default backend is 'cpu', not an NVIDIA Hopper GPU"
