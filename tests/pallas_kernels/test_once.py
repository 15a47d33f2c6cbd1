"""Kernels that a program calls often are one function of it."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.once import once
from pallas_kernels.quantize import quantize_both


def test_the_same_kernel_on_the_same_shapes_is_lowered_once(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_obstacle", lambda: None)

    def layers(x):
        first = [quantize_both(x * factor) for factor in range(3)]
        return first, [quantize_both(x[:128] + 1, power_of_two) for power_of_two in (True, False, True)]

    x = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)
    program = jax.jit(layers).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"call @quantize_both", program)) == 6
    assert program.count("custom_call @mosaic_gpu") == 3, "one of each shape and kind of scale"


def test_what_is_fixed_makes_another_function_and_arrays_may_be_named():
    def scale(x, *, by, into=None):
        return x * by if into is None else into + x * by

    assert once(scale, by=2) is once(scale, by=2)
    assert once(scale, by=2) is not once(scale, by=3)
    assert once(scale, by=3)(jnp.ones(2), into=jnp.ones(2)).tolist() == [4, 4]
    with pytest.raises(TypeError, match="unhashable"):
        once(scale, by=[])
