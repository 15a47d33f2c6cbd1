"""FP8 experts on several devices: every transport against one device, with and without FP8 on the way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax.nn import fp8
from dsv3_jax.nn.block import rematerialize
from dsv3_jax.nn.moe import MoE, place_experts
from pallas_kernels.testing import calc_diff
from sharding.expert_parallel import ExpertParallel
from sharding.mesh import BATCH_AXES, make_mesh
from tests.dsv3_jax import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = micro.config(
    micro.V3 | {"hidden_size": 128, "moe_intermediate_size": 128, "n_shared_experts": 0, "num_experts_per_tok": 2}
).model
SPECS = {"gate_up": P("expert"), "down": P("expert")}
BATCH, TOKENS = 8, 40


def parts(placement):
    layer = micro.module(lambda rngs: MoE(CONFIG, rngs=rngs))
    place_experts(layer, placement)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), rest


def gradients(placement, remat="none"):
    graph, _, rest = parts(placement)

    def local(params, x, dy):
        codes = fp8.quantize_weights({"moe": {"moe": params}})

        def forward(params, x):
            attached = fp8.attach({"moe": {"moe": params}}, codes)["moe"]["moe"]
            assert isinstance(attached["gate_up"], fp8.FP8Weight)
            out, aux = nnx.merge(graph, nnx.State(attached), rest)(x)
            return out, aux.counts

        out, back, counts = jax.vjp(rematerialize(forward, remat, scanned=False), params, x, has_aux=True)
        dparams, dx = back(dy)
        if placement.size > 1:
            counts = lax.psum(counts, BATCH_AXES)
            dparams = {name: lax.psum(leaf, "data" if name in SPECS else BATCH_AXES) for name, leaf in dparams.items()}
        return out, dx, dparams, counts

    return local


def inputs():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((BATCH, TOKENS, CONFIG.hidden_size)), jnp.bfloat16) for _ in range(2))


@functools.cache
def one_device():
    return jax.jit(gradients(ExpertParallel()))(parts(ExpertParallel())[1], *inputs())


CASES = [
    pytest.param(ExpertParallel(4, "counted", capacity=1.0, fp8=True), "none", id="counted, FP8 on the way"),
    pytest.param(ExpertParallel(4, "ring", fp8=True), "none", id="ring, FP8 on the way", marks=pytest.mark.slow),
    pytest.param(ExpertParallel(4, "two_hop", fp8=True), "paper", id="two_hop, FP8 on the way", marks=pytest.mark.slow),
    pytest.param(ExpertParallel(4, "padded"), "paper", id="padded", marks=pytest.mark.slow),
    pytest.param(ExpertParallel(4, "counted", capacity=1.0), "none", id="counted", marks=pytest.mark.slow),
    pytest.param(ExpertParallel(4, "ring"), "none", id="ring", marks=pytest.mark.slow),
    pytest.param(ExpertParallel(4, "two_hop", capacity=0.0), "none", id="two_hop", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("placement", "remat"), CASES)
def test_every_transport_is_one_device_within_the_formats_error(placement, remat):
    """Outputs are sums in another order; tiles of 128 tokens in weight gradients hold other tokens together."""
    params = parts(placement)[1]
    specs = {name: SPECS.get(name, P()) for name in params}
    layer = jax.shard_map(
        gradients(placement, remat),
        mesh=make_mesh(expert=placement.size, data=8 // placement.size),
        in_specs=(specs, P(BATCH_AXES), P(BATCH_AXES)),
        out_specs=(P(BATCH_AXES), P(BATCH_AXES), specs, P()),
        check_vma=False,
    )
    (out, dx, dparams, counts), (one, wanted_dx, wanted, others) = jax.jit(layer)(params, *inputs()), one_device()
    np.testing.assert_array_equal(counts, others)
    # Tokens that travel in FP8 with powers of two arrive as the values that the products read anyway.
    assert calc_diff(out, one) < 2e-5
    assert calc_diff(dx, wanted_dx) < (2e-3 if placement.fp8 else 2e-5)
    for name in ("gate_up", "down"):
        assert dparams[name].dtype == jnp.float32
        assert calc_diff(dparams[name], wanted[name]) < 2e-3, name
