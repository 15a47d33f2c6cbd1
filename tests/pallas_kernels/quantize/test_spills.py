"""No kernel that quantizes spills registers (-m gpu): one program, for a process takes longer than its kernels."""

import pytest

from pallas_kernels.testing import spilled_bytes

PROGRAM = """
import jax
import jax.numpy as jnp
from pallas_kernels.norm_quantize import backward_sm90 as norm_backward, pallas_sm90 as norm
from pallas_kernels.quantize import e5m6_sm90, pallas_sm90
from pallas_kernels.swiglu_quantize import backward_sm90, pallas_sm90 as swiglu


def run(x, row, weight, gate_up):
    packed = e5m6_sm90.quantize_and_pack(x)
    made = [packed, e5m6_sm90.unpack_and_quantize_columns(packed[1], dtype=x.dtype)]
    made += [norm_backward.norm_backward(row, weight, row, residual, eps=1e-6) for residual in (None, row + 1)]
    for power_of_two in (False, True):
        both = pallas_sm90.quantize_both(x, power_of_two)
        made += [both, pallas_sm90.requantize_columns(*both[0], power_of_two)]
        made += [getattr(pallas_sm90, f"quantize_{form}")(x, power_of_two) for form in ("rows", "columns")]
        made += [pallas_sm90.quantize_weight(w, power_of_two) for w in (x[None], x[None].astype(jnp.float32))]
        made += [norm.norm_quantize(row, weight, 1e-6, power_of_two, with_output) for with_output in (False, True)]
        out, stored = swiglu.swiglu_quantize(gate_up, power_of_two)
        backward = [(stored, x, weights, power_of_two) for weights in (None, jnp.ones(len(x)))]
        made += [out, *(backward_sm90.swiglu_backward_quantize(*given) for given in backward)]
    return made


given = (jnp.ones(shape, jnp.bfloat16) for shape in ((256, 256), (128, 8192), (8192,), (256, 512)))
jax.block_until_ready(jax.jit(run)(*given))
"""


@pytest.mark.gpu
def test_no_kernel_spills_registers():
    assert spilled_bytes(PROGRAM) == [0] * 26
