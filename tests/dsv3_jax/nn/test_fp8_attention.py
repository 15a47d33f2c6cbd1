"""Attention with its FP8 projection: against float32, and what its backward pass reads of the stored output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.nn import fp8
from dsv3_jax.nn.fp8_attention import attend_and_project
from pallas_kernels.attention import attention_backward, attention_forward, causal_attention
from pallas_kernels.quantize import dequantize_rows, pack_e5m6, quantize_both, quantize_columns, unpack_e5m6
from pallas_kernels.testing import assert_close, calc_diff

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, TOKENS, HEADS, HEAD, VALUE, SIZE, SCALE = 2, 80, 4, 48, 32, 192, 48**-0.5
"""160 rows, 96 short of whole tiles; a projection of one tile and a half."""


@pytest.fixture(scope="module")
def found():
    """Results of the layer, of its definition from the pieces, and of float32."""
    rng = np.random.default_rng(0)
    shapes = ((BATCH, TOKENS, HEADS, HEAD), (BATCH, TOKENS, 2, HEAD), (BATCH, TOKENS, 2, VALUE))
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    master = jnp.asarray(rng.standard_normal((HEADS * VALUE, SIZE)) / 11, jnp.float32)
    dy = jnp.asarray(rng.standard_normal((BATCH, TOKENS, SIZE)), jnp.bfloat16)

    @jax.jit
    def run(q, k, v, master, dy):
        codes = fp8.quantize_weight(fp8.pad_to_tiles(master, 2))

        def layer(q, k, v, master):
            return attend_and_project(q, k, v, fp8.FP8Weight(master, codes), scale=SCALE)

        y, back = jax.vjp(layer, q, k, v, master)
        o, sums = attention_forward(q, k, v, scale=SCALE)
        stored = unpack_e5m6(pack_e5m6(o.reshape(BATCH * TOKENS, -1)), o.dtype)
        rows, columns = quantize_both(fp8.pad_to_tiles(dy.reshape(-1, SIZE), 2))
        do = fp8.trim(fp8.gemm(rows, fp8.FP8Weight(master, codes).backward, None, o.dtype), o.shape[:2], HEADS * VALUE)
        dq_dk_dv = attention_backward(q, k, v, stored.reshape(o.shape), sums, do.reshape(o.shape), scale=SCALE)
        tiles = quantize_columns(fp8.pad_rows(stored), True)
        pieces = dq_dk_dv, dequantize_rows(*tiles), dequantize_rows(*columns)

        def wide(q, k, v, master):
            return causal_attention(q, k, v, scale=SCALE).reshape(BATCH, TOKENS, -1) @ master

        y32, back32 = jax.vjp(wide, *(x.astype(jnp.float32) for x in (q, k, v)), master)
        return (y, *back(dy)), pieces, (y32, *back32(dy.astype(jnp.float32)))

    return run(q, k, v, master, dy)


def test_output_and_gradients_are_float32s_within_the_formats_error(found):
    layer, _, wanted = found
    for name, left, right in zip(("y", "dq", "dk", "dv", "dw"), layer, wanted, strict=True):
        assert 1e-5 < calc_diff(left, right) < 2e-3, name
    assert layer[4].dtype == jnp.float32


def test_both_halves_of_the_backward_read_the_stored_output(found):
    (_, dq, dk, dv, dw), (gradients, x_XM, dy_NM), _ = found
    jax.tree.map(np.testing.assert_array_equal, (dq, dk, dv), gradients)
    assert calc_diff(dw, np.asarray(x_XM, np.float64) @ np.asarray(dy_NM, np.float64).T[:, :SIZE]) < 1e-11


def test_the_backward_of_attention_would_notice_another_output():
    """What it reads of the stored output is its product with the gradient: scaled, it moves dq and dk, not dv."""
    rng = np.random.default_rng(1)
    q, k, v, do = (jnp.asarray(rng.standard_normal((1, 9, 2, 8)), jnp.float32) for _ in range(4))
    o, sums = attention_forward(q, k, v, scale=0.3)
    expected = jax.vjp(lambda *x: causal_attention(*x, scale=0.3), q, k, v)[1](do)
    jax.tree.map(assert_close, attention_backward(q, k, v, o, sums, do, scale=0.3), expected)
    dq, dk, dv = attention_backward(q, k, v, 1.1 * o, sums, do, scale=0.3)
    assert_close(dv, expected[2])
    assert calc_diff(dq, expected[0]) > 1e-4
    assert calc_diff(dk, expected[1]) > 1e-4
