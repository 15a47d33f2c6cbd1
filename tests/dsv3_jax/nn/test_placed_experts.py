"""The mixture-of-experts layer with its experts on several devices: outputs and gradients of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax.nn.block import rematerialize
from dsv3_jax.nn.moe import MoE, place_experts
from pallas_kernels.testing import assert_close
from sharding.expert_parallel import ExpertParallel
from sharding.mesh import BATCH_AXES, make_mesh
from tests.dsv3_jax import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = micro.config(micro.V3).model
SPECS = {"gate_up": P("expert"), "down": P("expert")}


def parts(placement):
    layer = micro.module(lambda rngs: MoE(CONFIG, rngs=rngs))
    place_experts(layer, placement)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), rest


def gradients(placement, remat):
    graph, _, rest = parts(placement)

    def local(params, x, dy):
        def forward(params, x):
            out, aux = nnx.merge(graph, nnx.State(params), rest)(x)
            return out, aux.counts

        out, back, counts = jax.vjp(rematerialize(forward, remat, scanned=False), params, x, has_aux=True)
        dparams, dx = back(dy)
        if placement.size == 1:
            return out, counts, dparams, dx
        mean_of = {name: "data" if name in SPECS else BATCH_AXES for name in dparams}
        dparams = {name: lax.psum(leaf, mean_of[name]) for name, leaf in dparams.items()}
        return out, lax.psum(counts, BATCH_AXES), dparams, dx

    return local


def layer_on(placement, remat):
    params = parts(placement)[1]
    specs = {name: SPECS.get(name, P()) for name in params}
    sharded = jax.shard_map(
        gradients(placement, remat),
        mesh=make_mesh(expert=placement.size, data=2),
        in_specs=(specs, P(BATCH_AXES), P(BATCH_AXES)),
        out_specs=(P(BATCH_AXES), P(), specs, P(BATCH_AXES)),
        check_vma=False,
    )
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((8, 5, CONFIG.hidden_size)), jnp.float32) for _ in range(2))
    return jax.jit(sharded), (params, x, dy)


@pytest.mark.parametrize(("transport", "remat"), [("padded", "paper"), ("ring", "none")])
def test_outputs_gradients_and_counts_equal_those_of_one_device(transport, remat):
    layer, arguments = layer_on(ExpertParallel(2, transport, capacity=1.0), remat)
    found = layer(*arguments)
    expected = jax.jit(gradients(ExpertParallel(), "none"))(*arguments)
    np.testing.assert_array_equal(found[1], expected[1])
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(left, right, tolerance=2e-6)


def exchanges(placement, remat):
    layer, arguments = layer_on(placement, remat)
    return str(layer.trace(*arguments).jaxpr).count("all_to_all[")


@pytest.mark.parametrize("placement", [ExpertParallel(2, fp8=True), ExpertParallel(4, "two_hop", capacity=0.0)])
def test_recomputing_what_the_paper_does_sends_no_token_a_second_time(placement):
    assert exchanges(placement, "paper") == exchanges(placement, "none") < exchanges(placement, "full")


def test_whole_weights_where_shares_are_expected_are_refused():
    graph, params, rest = parts(ExpertParallel(2))
    with pytest.raises(ValueError, match=r"^weights of 8 experts on each of 2 ranks, the model has 8$"):
        nnx.merge(graph, nnx.State(params), rest)(jnp.zeros((1, 3, CONFIG.hidden_size)))
