"""The training step: accumulation, devices, skipping, bias update, evaluation; and that balance really works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, replace
from dsv3_jax.train.state import TrainState, abstract_state, init_state, model_of
from dsv3_jax.train.step import make_eval_step, make_train_step
from pallas_kernels.testing import assert_close
from tests.dsv3_jax import micro, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

GAMMA = 0.001
CONFIG = micro.config(
    micro.ROUTED_ONLY | {"num_hidden_layers": 1, "n_shared_experts": 0},
    train={"micro_batch_size": 2, "loss_chunk": 16},
    # A large eps makes the update smooth in the gradient: parameters can be compared at float32's own tolerance.
    optim={"learning_rate": 0.5, "eps": 1.0, "moment_dtype": "float32", "grad_clip_norm": 0.0, "weight_decay": 0.1},
    loss={"sequence_balance": 0.01, "bias_update_speed": GAMMA},
)
"""Eight sequences in four micro-batches on one device."""
ROWS = micro.tokens(CONFIG.model, rows=8, seed=2)


@functools.cache
def step_of(config):
    """One compiled program a configuration, shared by all tests."""
    return make_train_step(config)


def state_of(config, seed=0, **changes):
    """A state with drawn weights. The step uses its buffers up."""
    return micro.train_state(config, seed=seed, **changes)


def host(tree):
    return jax.tree.map(np.array, tree)


def one_step(config, rows=ROWS, **changes):
    state, metrics = step_of(config)(state_of(config, **changes), rows)
    return host(state), host(metrics)


def gradients(state):
    """The step's gradients: beta1 = 0.9, so the first moment is a tenth of them."""
    return jax.tree.map(lambda leaf: leaf / (1 - 0.9), state.opt_state[0].mu)


@pytest.fixture(scope="module")
def base():
    """The state before the step, the state after it, and its metrics."""
    return host(state_of(CONFIG)), *one_step(CONFIG)


def assert_same_step(found, expected):
    (state, metrics), (wanted, wanted_metrics) = found, expected
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(wanted_metrics[name]), rel=1e-5), name
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), gradients(state), gradients(wanted))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), state.params, wanted.params)
    np.testing.assert_array_equal(metrics["expert_load"], wanted_metrics["expert_load"])
    jax.tree.map(np.testing.assert_array_equal, state.router_bias, wanted.router_bias)


@pytest.fixture(scope="module")
def numpy_model():
    """Losses, counts of every router and the smallest selection margin over all rows, by NumPy."""
    cfg, split = CONFIG.model, micro.parts(CONFIG.model)
    weights = micro.published(split)
    main, ahead, balance, counts, margins = [], [], 0.0, np.zeros((2, 8), int), []
    for row in ROWS:
        logits, (depth,), traces = reference.forward(row, weights, cfg)
        main.append(reference.nats(logits, row[1:]))
        ahead.append(reference.nats(depth[:-1], row[2:]))
        for layer, trace in enumerate(traces):
            scores = np.stack([s for _, s, _ in trace])
            top = np.argsort(-scores, axis=1)[:, : cfg.num_experts_per_tok]
            balance += 0.01 * reference.sequence_balance(scores, top, cfg.num_experts_per_tok) / len(ROWS)
            for experts, _, margin in trace:
                counts[layer] += np.bincount(experts, minlength=8)
                margins.append(margin)
    labels = ROWS[:, 1:].size
    return {
        "loss": np.sum(main) / labels,
        "mtp_loss": np.sum(ahead) / labels,
        "balance_loss": balance,
        "counts": counts,
        "margin": min(margins),
    }


def test_metrics_are_the_means_over_the_whole_step(base, numpy_model):
    _, state, metrics = base
    assert numpy_model["margin"] > 1e-5
    for name in ("loss", "mtp_loss", "balance_loss"):
        assert float(metrics[name]) == pytest.approx(numpy_model[name], rel=1e-5), name
    counts = numpy_model["counts"]
    np.testing.assert_allclose(metrics["expert_load"], counts / counts.mean(-1, keepdims=True), rtol=1e-6)
    assert float(metrics["max_vio"]) == pytest.approx((counts.max(-1) / counts.mean(-1)).mean() - 1, rel=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients(state))))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert (metrics["lr"], metrics["step"], metrics["tokens"]) == (0.5, 1, 8 * 12)
    assert (int(metrics["skipped"]), int(metrics["nonfinite"])) == (0, 0)
    assert (state.step, state.tokens) == (1, 8 * 12)


def test_router_biases_move_by_the_rule_on_the_counts_of_the_whole_step_mtps_too(base, numpy_model):
    before, after, _ = base
    counts = numpy_model["counts"]
    change = np.float32(GAMMA) * np.sign(counts.mean(-1, keepdims=True) - counts)
    assert set(np.sign(change).ravel()) == {-1.0, 1.0} or 0.0 in change
    old, new = before.router_bias, after.router_bias
    np.testing.assert_array_equal(
        new["moe"]["moe"]["router"]["bias"], old["moe"]["moe"]["router"]["bias"] + change[:1].astype(np.float32)
    )
    np.testing.assert_array_equal(
        new["mtp"][0]["block"]["moe"]["router"]["bias"],
        old["mtp"][0]["block"]["moe"]["router"]["bias"] + change[1].astype(np.float32),
    )


def test_parameters_move_against_the_gradient_by_adam_with_decay_on_matrices(base):
    before, after, _ = base

    def moved(path, old, gradient):
        decay = 0.0 if path[-1].key == "scale" else 0.1
        return old - 0.5 * (gradient / (np.abs(gradient) + 1.0) + decay * old)

    expected = jax.tree.map_with_path(moved, before.params, gradients(after))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), after.params, expected)


def test_micro_batches_add_up_to_the_whole_batch(base):
    _, *expected = base
    assert_same_step(one_step(replace(CONFIG, train={"micro_batch_size": 0})), expected)


@pytest.mark.parametrize(
    ("devices", "micro_batch"),
    [(4, 1), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(8, 1, marks=pytest.mark.slow)],
)
def test_data_parallel_devices_equal_one(base, numpy_model, devices, micro_batch):
    assert numpy_model["margin"] > 1e-5
    config = replace(CONFIG, mesh={"data": devices}, train={"micro_batch_size": micro_batch})
    state, metrics = step_of(config)(state_of(config), ROWS)
    for leaf in jax.tree.leaves((state.router_bias, metrics["loss"])):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == devices
        for other in copies[1:]:
            np.testing.assert_array_equal(other, copies[0])
    _, *expected = base
    assert_same_step((host(state), host(metrics)), expected)


def test_a_batch_ramp_runs_one_program_and_its_padding_adds_nothing():
    step = step_of(CONFIG)
    few, twice = ROWS[:4], np.concatenate([ROWS[:4], ROWS[:4]])
    found, expected = one_step(CONFIG, few), one_step(CONFIG, twice)
    assert_same_step(found, expected)
    assert found[0].tokens == 4 * 12
    state, _ = step(state_of(CONFIG), few)
    step(state, ROWS)
    assert step.jitted._cache_size() == 1


def test_padding_inside_a_batch_is_never_learned():
    padded = ROWS.copy()
    padded[:, 9:] = -1
    padded[4:] = -1
    found, same = one_step(CONFIG, padded), one_step(CONFIG, np.where(padded < 0, -7, padded))
    jax.tree.map(np.testing.assert_array_equal, found, same)
    _, fewer = one_step(CONFIG, padded[:4])
    for name in ("loss", "mtp_loss"):
        assert float(found[1][name]) == pytest.approx(float(fewer[name]), rel=1e-6)
    weights = micro.published(micro.parts(CONFIG.model))
    nats = [reference.nats(reference.forward(row, weights, CONFIG.model)[0], row[1:])[:8] for row in ROWS[:4]]
    assert float(found[1]["loss"]) == pytest.approx(np.mean(nats), rel=1e-5)


def broken(kind):
    params = micro.parts(CONFIG.model).params
    if kind == "nan":
        params["moe"]["moe"]["down"] = params["moe"]["moe"]["down"].at[0, 3, 1, 1].set(jnp.nan)
    else:  # every parameter finite, the logits not
        params["head"]["kernel"] = jnp.full_like(params["head"]["kernel"], 3e38)
    return params


@pytest.mark.parametrize("kind", ["nan", "overflow"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(kind):
    step, params = step_of(CONFIG), broken(kind)
    state = state_of(CONFIG, params=params)
    before = host(state)
    state, metrics = step(state, ROWS)
    assert (int(metrics["skipped"]), int(metrics["nonfinite"])) == (1, 1)
    after = host(state)
    for name in ("params", "router_bias", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert (after.step, after.tokens) == (1, 96)
    state, metrics = step(state, ROWS)
    assert (int(metrics["nonfinite"]), int(state.nonfinite)) == (2, 2)


def test_a_finite_step_sets_the_count_of_bad_ones_back():
    state, metrics = one_step(CONFIG, nonfinite=jnp.int32(4))
    assert (int(metrics["skipped"]), int(metrics["nonfinite"]), int(state.nonfinite)) == (0, 0, 0)


def test_scalars_of_the_step_follow_consumed_tokens():
    pieces = [{"until": 96, "value": 0.3}, {"until": 1e9, "value": 0.1}]
    config = micro.config(
        micro.V3,
        train={"micro_batch_size": 2},
        loss={"mtp_weight": pieces, "bias_update_speed": pieces},
        optim={"warmup_steps": 4, "learning_rate": 1.0},
    )
    step = make_train_step(config)
    state = TrainState({}, {}, {}, jnp.zeros((), jnp.int32), step=2, tokens=96)
    later = TrainState({}, {}, {}, jnp.zeros((), jnp.int32), step=3, tokens=97)
    found = [step.arguments(s, ROWS[:4])[2] for s in (state, later)]
    assert [float(s.learning_rate) for s in found] == [0.75, 1.0]
    assert [float(s.mtp_weight) for s in found] == pytest.approx([0.3, 0.1])
    assert [float(s.bias_update_speed) for s in found] == pytest.approx([0.3, 0.1])
    assert [int(s.micro_batches) for s in found] == [2, 2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:, :-1], r"rows of 12 tokens: train\.seq_len = 12 needs one more"),
        (ROWS[:3], r"a batch of 3 sequences must be 1 to 4 times 2 \(train\.micro_batch_size x devices\)"),
        (np.concatenate([ROWS, ROWS[:2]]), r"a batch of 10 sequences must be 1 to 4 times 2"),
        (ROWS[:0], r"a batch of 0 sequences must be 1 to 4 times 2"),
    ],
)
def test_rows_that_do_not_fit_are_refused_in_one_line(rows, message):
    with pytest.raises(ConfigError, match=message):
        step_of(CONFIG).arguments(state_of(CONFIG), rows)


def test_a_mesh_of_more_devices_than_there_are_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="needs 16 devices, this machine has 8"):
        make_train_step(replace(CONFIG, mesh={"data": 16}, train={"batch_size": 16, "micro_batch_size": 1}))


def test_an_abstract_state_has_the_shapes_types_and_places_of_a_real_one():
    config = micro.config(micro.DENSE_GQA | {"num_hidden_layers": 1}, mesh={"data": 2})
    found, abstract = init_state(config), abstract_state(config)
    assert jax.tree.structure(found) == jax.tree.structure(abstract)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(abstract), strict=True):
        assert (left.shape, left.dtype, left.sharding) == (right.shape, right.dtype, right.sharding)


def test_the_model_of_a_state_is_the_model():
    state = state_of(CONFIG)
    model = model_of(CONFIG, state.params, state.router_bias)
    np.testing.assert_array_equal(model.head.kernel[...], state.params["head"]["kernel"])
    np.testing.assert_array_equal(model.moe.moe.router.bias[...], state.router_bias["moe"]["moe"]["router"]["bias"])


def test_evaluation_sums_nats_over_the_labels_of_any_number_of_rows():
    config = replace(CONFIG, mesh={"data": 2})
    rows = ROWS[:5].copy()
    rows[4, 7:] = -1
    nats, labels = make_eval_step(config)(state_of(config), rows)
    weights = micro.published(micro.parts(config.model))
    expected = [
        reference.nats(reference.forward(np.maximum(row, 0), weights, config.model)[0], np.maximum(row[1:], 0))
        for row in rows
    ]
    assert labels == 4 * 12 + 6
    assert nats == pytest.approx(sum(np.sum(e[row[1:] >= 0]) for e, row in zip(expected, rows, strict=True)), rel=1e-5)


def test_balance_without_a_loss_works_in_a_short_run():
    """MaxVio over the last steps of a run on skewed tokens, with the bias update and without: nothing else differs."""
    step = step_of(CONFIG)
    rng = np.random.default_rng(0)
    shares = 1.0 / np.arange(1, 62) ** 1.2
    batches = rng.choice(61, (80, 8, 13), p=shares / shares.sum()).astype(np.int32)
    unbiased = jax.tree.map(jnp.zeros_like, micro.parts(CONFIG.model).router_bias)
    ends = {}
    for gamma in (0.0, 0.02):
        state, loads = state_of(CONFIG, router_bias=unbiased), []
        for rows in batches:
            arrays, tokens, scalars = step.arguments(state, rows)
            scalars = scalars._replace(bias_update_speed=np.float32(gamma), learning_rate=np.float32(0.05))
            arrays, metrics = step.jitted(arrays, tokens, scalars)
            state = TrainState(**arrays, step=0, tokens=0)
            loads.append(metrics["expert_load"])
        ends[gamma] = np.mean(np.max(np.mean(loads[-20:], axis=0), axis=-1)) - 1
        if not gamma:
            assert not any(leaf.any() for leaf in jax.tree.leaves(state.router_bias)), "gamma 0 freezes the bias"
    assert ends[0.02] < 0.4 * ends[0.0]
