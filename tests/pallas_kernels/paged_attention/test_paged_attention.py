"""Attention over pages against float64 NumPy over whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import cases, paged_attention, quantize_latents
from pallas_kernels.testing import assert_close, relative_l2

attend = jax.jit(paged_attention, static_argnames=("scale", "implementation"))
IDS = [case.name for case in cases.SMALL]


def definition(case, q_BTNC, q_BTNR, latent_PSC, key_PSR, table_BX, scale):
    """One sequence, query and head after another."""
    out = np.zeros(q_BTNC.shape)
    for b, length in enumerate(case.lengths):
        places = [(table_BX[b, s // case.page], s % case.page) for s in range(length)]
        latent = np.array([latent_PSC[place] for place in places], np.float64)
        key = np.array([key_PSR[place] for place in places], np.float64)
        for t in range(case.queries):
            seen = length - case.queries + t + 1
            for n in range(case.heads):
                scores = scale * (latent[:seen] @ q_BTNC[b, t, n] + key[:seen] @ q_BTNR[b, t, n])
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ latent[:seen]
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=("float32", "bfloat16"))
@pytest.mark.parametrize("case", cases.SMALL, ids=IDS)
def test_output_equals_the_float64_definition(case, dtype):
    *floats, table, first = case.arrays()
    floats = [jnp.asarray(array, dtype) for array in floats]
    scale = 0.3 * (case.latent + case.rope) ** -0.5
    out = attend(*floats, table, first, scale=scale)
    assert out.dtype == dtype
    assert_close(out, definition(case, *(np.asarray(a, np.float64) for a in floats), table, scale))


def test_fp8_latents_are_read_as_codes_times_scales():
    case = cases.MANY_TILES
    q_BTNC, q_BTNR, latent_PSC, key_PSR, table, first = map(jnp.asarray, case.arrays())
    codes, scale_PSX = quantize_latents(jnp.where(jnp.isfinite(latent_PSC), latent_PSC, 1.0))
    assert codes.dtype == jnp.float8_e4m3fn
    assert scale_PSX.shape == (*latent_PSC.shape[:2], -(-case.latent // 128))
    spread = np.repeat(scale_PSX, 128, axis=-1)[..., : case.latent]
    plain = np.asarray(codes, np.float32) * spread
    assert 0 < relative_l2(plain[1:], latent_PSC[1:]) < 0.04
    got = attend(q_BTNC, q_BTNR, codes, key_PSR, table, first, scale_PSX, scale=0.1)
    assert_close(got, attend(q_BTNC, q_BTNR, jnp.asarray(plain), key_PSR, table, first, scale=0.1))


def test_fp8_without_scales_and_scales_without_fp8_are_one_clear_line():
    *floats, table, first = map(jnp.asarray, cases.TINY.arrays())
    codes, scales = floats[2].astype(jnp.float8_e4m3fn), jnp.ones((*floats[2].shape[:2], 1))
    with pytest.raises(ValueError, match="latents of float8_e4m3fn need scales"):
        paged_attention(floats[0], floats[1], codes, floats[3], table, first, scale=1.0)
    with pytest.raises(ValueError, match="latents of float32 have no scales"):
        paged_attention(*floats, table, first, scales, scale=1.0)


def test_a_kernel_asked_for_that_cannot_run_raises():
    *floats, table, first = map(jnp.asarray, cases.TINY.arrays())
    with pytest.raises(ValueError, match="paged_attention: implementation 'pallas' cannot run"):
        paged_attention(*floats, table, first, scale=1.0, implementation="pallas")


def test_v3s_cases_count_what_the_peers_count():
    assert cases.V3.flops == 2 * 128 * 128 * 4096 * (576 + 512)
    assert cases.V3.bytes() == 2 * (128 * 4096 * 576 + 128 * 128 * (576 + 512))
