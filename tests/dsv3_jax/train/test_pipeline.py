"""The contract of every schedule against one device (design section 5): MTP, balance losses and clipping on."""

import functools

import jax
import numpy as np
import pytest

from dsv3_jax.config import replace
from dsv3_jax.train.pipeline import Pipeline
from dsv3_jax.train.state import config_layout, config_mesh, placed_model, plain_state
from dsv3_jax.train.step import make_train_step
from pallas_kernels.testing import assert_close
from sharding.pipeline import make_schedule, table
from tests.dsv3_jax import micro, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = micro.config(
    micro.V3 | {"vocab_size": 64, "num_hidden_layers": 7, "attention": "mha", "num_key_value_heads": 1, "head_dim": 8},
    train={"micro_batch_size": 1, "batch_size": 16, "loss_chunk": 16},
    optim={"learning_rate": 1e-3, "moment_dtype": "float32", "grad_clip_norm": 0.1, "weight_decay": 0.1},
    loss={"sequence_balance": 0.01, "bias_update_speed": 0.001, "mtp_weight": 0.3},
)
"""A dense layer, six routed ones: as many as stages, fewer, or not a multiple of them."""
ROWS = micro.tokens(CONFIG.model, rows=16, seed=5)
MESHES = [(2, 4, 1), (2, 2, 2), (4, 2, 1), (4, 1, 2), (8, 1, 1)]
ONE_WAY = ("gpipe", "1f1b", "zb1p")
"""They share a program: what differs is the table."""
TWO_WAY = {(4, 2, 1, ("dualpipe",)), (2, 4, 1, ("dualpipev",))}
DEFAULT = {(2, 2, 2, ONE_WAY), (4, 1, 2, ONE_WAY), (8, 1, 1, ONE_WAY), *TWO_WAY}
"""One program compiles for half a minute: the others are for `-m slow`."""
BOUNDED = {(4, 2, 1, ("dualpipe",)), (4, 1, 2, ONE_WAY), (4, 1, 2, ("dualpipev",))}
"""Run with one weight gradient that waits at most, where their schedules would have two or more."""
UNROLLED = {(2, 4, 1, ("dualpipev",)), (2, 4, 1, ONE_WAY), (4, 1, 2, ("dualpipe",))}
"""Run with every layer apart in the program: three on each of two stages, or two and on the last of four none."""
BESIDE = {(2, 4, 1, ("dualpipev",)), (4, 2, 1, ONE_WAY), (8, 1, 1, ("dualpipe",))}
"""Messages travel beside the next tick."""
PROGRAMS = [
    pytest.param(*mesh, names, marks=() if (*mesh, names) in DEFAULT else pytest.mark.slow)
    for mesh in MESHES
    for names in (ONE_WAY, ("dualpipe",), ("dualpipev",))
]


def three_steps(config, step):
    """After one step and after three: the state on the host; metrics of the first."""
    state, seen = micro.train_state(config), []
    for number in (1, 2, 3):
        state, metrics = step(state, ROWS)
        if number != 2:
            seen.append(jax.tree.map(np.array, (plain_state(config, state), metrics)))
    return seen


@functools.cache
def one_step():
    return make_train_step(CONFIG)


@functools.cache
def one_device():
    return three_steps(CONFIG, one_step())


def losses_of_fewer(config, step):
    """Loss and gradient norm of half the batch."""
    _, metrics = step(micro.train_state(config), ROWS[:8])
    return float(metrics["loss"]), float(metrics["grad_norm"])


def pipelined_step(config, names):
    """A step that runs any of those schedules, and their tables."""
    step = make_train_step(config)
    micro_batches = step.most_micro_batches
    mesh = config.mesh
    tables = [table(make_schedule(name, mesh.pipe, micro_batches, mesh.waiting), mesh.lag) for name in names]
    partition = config_layout(config, config_mesh(config)).partition
    step._pipeline = Pipeline(config, placed_model(config), partition, *tables)
    return step, dict(zip(names, tables, strict=True))


def assert_like_one_device(found):
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


def test_no_choice_of_an_expert_is_a_matter_of_rounding():
    """Counts and biases can be compared exactly only then."""
    weights = micro.published(micro.parts(CONFIG.model))
    traces = [trace for row in ROWS for layer in reference.forward(row, weights, CONFIG.model)[2] for trace in layer]
    assert min(margin for _, _, margin in traces) > 1e-5


@pytest.mark.parametrize(("pipe", "expert", "data", "names"), PROGRAMS)
def test_a_pipeline_equals_one_device(pipe, expert, data, names):
    case = pipe, expert, data, names
    mesh = {"pipe": pipe, "expert": expert, "data": data, "schedule": names[-1], "transport": "padded"}
    mesh |= {"waiting": 1 if case in BOUNDED else -1, "lag": 2 if case in BESIDE else 1}
    config = replace(CONFIG, mesh=mesh, train={"unroll": case in UNROLLED})
    step, tables = pipelined_step(config, names)
    with pytest.MonkeyPatch.context() as patch:
        for one in tables.values():
            patch.setattr(step._pipeline, "rows", lambda _, one=one: Pipeline.rows(step._pipeline, one))
            assert_like_one_device(three_steps(config, step))
    if names == ONE_WAY:  # the two-way schedules need all micro-batches there are
        found, expected = (losses_of_fewer(*of) for of in ((config, step), (CONFIG, one_step())))
        assert found == pytest.approx(expected, rel=1e-5), "a smaller batch runs in the same program"
