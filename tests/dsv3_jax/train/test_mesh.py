"""The contract of every mesh and transport against one device (design section 5), all of V3 in it."""

import functools

import jax
import numpy as np
import pytest

from dsv3_jax.config import replace
from dsv3_jax.train.state import config_layout, config_mesh
from dsv3_jax.train.step import make_train_step
from pallas_kernels.testing import assert_close
from tests.dsv3_jax import micro, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = micro.config(
    micro.V3 | {"vocab_size": 64},
    train={"micro_batch_size": 1, "loss_chunk": 16},
    optim={"learning_rate": 1e-3, "moment_dtype": "float32", "grad_clip_norm": 0.1, "weight_decay": 0.1},
    loss={"sequence_balance": 0.01, "bias_update_speed": 0.001, "mtp_weight": 0.3},
)
ROWS = micro.tokens(CONFIG.model, rows=8, seed=2)
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
DEFAULT = {(2, 4, "counted"), (1, 8, "padded")}
"""One program compiles for half a minute: the others are for `-m slow`."""
COMBINATIONS = [
    pytest.param(expert, data, transport, marks=() if (expert, data, transport) in DEFAULT else pytest.mark.slow)
    for expert, data in MESHES
    for transport in ("padded", "counted", "ring", "two_hop")
    if (transport != "two_hop" or expert >= 4) and (expert > 1 or transport == "padded")
]


def three_steps(config):
    """After one step and after three: the state on the host; metrics of the first."""
    state, step, seen = micro.train_state(config), make_train_step(config), []
    for _ in range(3):
        state, metrics = step(state, ROWS)
        seen.append((jax.tree.map(np.array, state), jax.tree.map(np.array, metrics)))
    return seen[0], seen[2]


@functools.cache
def one_device():
    return three_steps(CONFIG)


def test_no_choice_of_an_expert_is_a_matter_of_rounding():
    """Counts and biases can be compared exactly only then."""
    weights = micro.published(micro.parts(CONFIG.model))
    traces = [trace for row in ROWS for layer in reference.forward(row, weights, CONFIG.model)[2] for trace in layer]
    assert min(margin for _, _, margin in traces) > 1e-5


@pytest.mark.parametrize(("expert", "data", "transport"), COMBINATIONS)
def test_a_mesh_equals_one_device(expert, data, transport):
    mesh = {"expert": expert, "data": data, "transport": transport}
    # Unrolled layers' weights and gradients travel one by one: seen where all are gathered.
    found = three_steps(replace(CONFIG, mesh=mesh, train={"unroll": data == 8}))
    expected = one_device()
    (first, metrics), (one, wanted) = found[0], expected[0]
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(wanted[name]), rel=1e-5), name
    assert float(metrics["grad_norm"]) > 0.1, "the clip is at work"
    # beta1 = 0.9: after one step the first moment is a tenth of the clipped gradient.
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), first.opt_state[0].mu, one.opt_state[0].mu)
    for (state, numbers), (other, others) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(numbers["expert_load"], others["expert_load"])
        jax.tree.map(np.testing.assert_array_equal, state.router_bias, other.router_bias)
        jax.tree.map(functools.partial(assert_close, tolerance=1e-4), state.params, other.params)


def test_what_the_optimizer_needs_is_shared_out():
    """Each device holds its share of masters and moments, and no more."""
    config = replace(CONFIG, mesh={"expert": 2, "data": 4})
    _, params, _ = micro.parts(config.model)
    layout = config_layout(config, config_mesh(config))
    places = layout.shardings({"params": params})["params"]
    held = sum(np.prod(place.shard_shape(leaf.shape)) for leaf, place in _pairs(params, places))
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert held < 1.3 * whole / 8
    experts = places["moe"]["moe"]["gate_up"]
    assert experts.shard_shape(params["moe"]["moe"]["gate_up"].shape)[1] == config.model.n_routed_experts // 2


def _pairs(tree, places):
    return zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)


def _loops(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from _loops(inner)


@pytest.mark.parametrize(("unroll", "narrow"), [(True, 36000), (False, 0)])
def test_micro_batches_read_gathered_weights_in_the_type_they_travelled_in(unroll, narrow):
    train = {"precision": "bf16", "unroll": unroll, "micro_batch_size": 1, "batch_size": 16}
    step = make_train_step(micro.config(train=train, mesh={"expert": 2, "data": 4}))
    traced = step.jitted.trace(*step.abstract_arguments()).jaxpr.jaxpr
    loop = max(_loops(traced), key=lambda equation: len(equation.invars))
    first = loop.params["cond_nconsts"]
    read = [x.aval for x in loop.invars[first : first + loop.params["body_nconsts"]]]
    numbers = {kind: sum(x.size for x in read if x.dtype == kind) for kind in ("bfloat16", "float32")}
    assert numbers["bfloat16"] == narrow
    assert sum(numbers.values()) == 37335, "norms, routers and their biases beside"
