"""What the program of a pipelined step holds: traced, never compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType

from dsv3_jax.config import replace
from dsv3_jax.train import pipeline
from dsv3_jax.train.loss import activation_dtype
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import TrainStep, make_train_step
from tests.dsv3_jax import micro

MODEL = {"hidden_size": 34, "intermediate_size": 46, "moe_intermediate_size": 13, "num_hidden_layers": 3}
CONFIG = micro.config(
    micro.V3 | MODEL,
    train={"micro_batch_size": 1, "batch_size": 16, "seq_len": 11},
    mesh={"pipe": 2, "expert": 4, "schedule": "zb1p"},
)
CHOICES = [("fp32", "none", "padded"), ("fp32", "none", "ring"), ("fp8", "paper", "counted")]


def traced(config):
    """The step's jaxpr."""
    step, state = make_train_step(config), abstract_state(config)
    return jax.make_jaxpr(step.jitted)(*step.arguments(state, np.zeros((16, config.train.seq_len + 1), np.int32)))


class _Seen(Exception):
    pass


@pytest.mark.parametrize(("precision", "remat", "transport"), CHOICES)
def test_rings_hold_no_weights_and_gradients_of_matrices_wait(precision, remat, transport, monkeypatch):
    """All wait but what further turns of an exchange add to experts' gradients."""
    config = replace(CONFIG, mesh={"transport": transport}, train={"precision": precision, "remat": remat})

    def look(parts, _slots, weights, given, d_cost, **_):
        weights, given = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (weights, given))
        kept, deferred = ([jnp.zeros(of.shape, of.dtype) for of in shapes] for shapes in (parts.kept, parts.deferred))
        dy = jnp.zeros((1, config.train.seq_len, config.model.hidden_size), activation_dtype(precision))
        _, now, _ = parts.backward_input(weights, given, kept, (dy, d_cost))
        later = parts.weight_gradient(weights, given, deferred)

        shapes = {leaf.shape for leaf in jax.tree.leaves(weights) if leaf.ndim > 1}
        assert not [of for of in [*parts.kept, *parts.deferred] if {of.shape, of.shape[::-1]} & shapes]
        waits = jax.tree.map(lambda leaf: leaf is not None, later, is_leaf=lambda leaf: leaf is None)
        assert waits == jax.tree.map(lambda leaf: leaf.ndim > 1, weights)
        at_once = [leaf.shape for leaf in jax.tree.leaves(now) if leaf.ndim > 1]
        experts = [weights["moe"][name].shape for name in ("down", "gate_up")]
        assert at_once == ([] if transport == "padded" else experts)
        raise _Seen

    monkeypatch.setattr(pipeline, "Stack", look)
    with pytest.raises(_Seen):
        traced(config)


@pytest.mark.parametrize("lag", [1, 2])
def test_only_a_tick_itself_holds_an_exchange_between_stages_and_none_sums_over_data(lag):
    program = traced(replace(CONFIG, mesh={"schedule": "dualpipev", "lag": lag})).jaxpr
    (tick,) = [body for body in _bodies(program) if "ppermute" in {eqn.primitive.name for eqn in body.eqns}]
    assert _axes_of(tick.eqns) == {"pipe"}
    sent = {eqn.invars[0] for eqn in tick.eqns if eqn.primitive.name == "ppermute"}
    assert (sent <= set(tick.invars)) == (lag == 2), "with lag 2 messages wait for nothing that the tick computes"
    inside = list(_bodies(tick))
    assert set().union(*(_axes_of(body.eqns) for body in inside)) == {"expert"}, "passes exchange tokens alone"


def _bodies(jaxpr):
    """Programs of loops and calls inside, at any depth."""
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            yield inner
            yield from _bodies(inner)


def _axes_of(eqns):
    found = set()
    for eqn in eqns:
        if eqn.primitive.name not in ("axis_index", "shard_map", "pvary"):
            axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
            found |= {axis for axis in ((axes,) if isinstance(axes, str) else axes) if isinstance(axis, str)}
    return found


def size_of(config):
    """Lines of the lowered program."""
    mesh = AbstractMesh(
        (config.mesh.pipe, config.mesh.expert, 1), ("pipe", "expert", "data"), axis_types=(AxisType.Auto,) * 3
    )
    step = TrainStep(config, mesh)
    return step.jitted.trace(*step.abstract_arguments()).lower(lowering_platforms=("cpu",)).as_text().count("\n")


@pytest.mark.slow
def test_a_program_grows_neither_with_micro_batches_nor_stages_nor_layers():
    base = {"pipe": 4, "schedule": "dualpipe"}
    first = size_of(replace(CONFIG, mesh=base, train={"batch_size": 32}))
    for changes in (
        {"mesh": base, "train": {"batch_size": 256}},
        {"mesh": base | {"pipe": 8}, "train": {"batch_size": 64}},
        {"mesh": base, "train": {"batch_size": 32}, "model": {"num_hidden_layers": 41}},
    ):
        assert size_of(replace(CONFIG, **changes)) == pytest.approx(first, rel=0.01), changes
