"""Schedules compared: costs from FLOPs or from given times, layers dealt out, what cannot be is told."""

import pytest

from dsv3_jax.config import ConfigError, load_config, replace
from dsv3_jax.planning import flops_per_token
from dsv3_jax.planning.flops import block_flops, end_flops
from dsv3_jax.planning.pipeline import PassTimes, PipelinePlan, plan_pipeline, stage_flops
from dsv3_jax.planning.stages import layers_of_stages, stages_of

V3 = load_config("deepseek_v3", {"mesh": {"cluster": "h800_2048", "waiting": -1}}, trainable=False)


@pytest.fixture(scope="module")
def published() -> PipelinePlan:
    return plan_pipeline(replace(V3, train={"batch_size": 128 * 32}))


@pytest.mark.parametrize("preset", ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "deepseek_moe_16b", "tiny"])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_flops_sum_to_the_model_s(preset, stages):
    """A third of a training token's; norms, which flops_per_token counts as products, are a hundredth of a percent."""
    model = load_config(preset).model
    total = sum(map(sum, stage_flops(model, 128, stages)))
    mtp = model.num_nextn_predict_layers > 0
    assert 3 * total == pytest.approx(flops_per_token(model, 128, mtp=mtp), rel=0.01 if preset == "tiny" else 1e-3)


def test_v3_s_layers_on_sixteen_stages():
    """58 mixture-of-experts layers; three dense layers, head and MTP make the ends as long with one of them each."""
    assert layers_of_stages(V3.model, 4096, 16) == (1, *(4,) * 14, 1)
    assert sum(layers_of_stages(V3.model, 4096, 32)) == 58
    assert max(layers_of_stages(V3.model, 4096, 32)) == 2


def test_ends_of_a_dense_free_model_cost_nothing_first():
    model = replace(load_config("tiny"), model={"first_k_dense_replace": 0, "num_nextn_predict_layers": 0}).model
    first, last = end_flops(model, 128)
    assert first == (0, 0)
    assert last == (2 * model.hidden_size * model.vocab_size, 0)
    assert block_flops(model, 255, moe=True)[1] == 128 * 2 * 4 * (48 + 32)


def test_given_times_are_a_stage_s_and_half_a_stage_s_of_the_v():
    plan = plan_pipeline(V3, PassTimes(forward=2.0, backward=5.0, weight=2.0, pair=6 / 7), micro_batches=34)
    found = {one.name: one for one in plan.schedules}
    assert plan.micro_batches == 34
    assert found["1f1b"].timeline.makespan == 34 * 7 + 15 * 7 == 34 * 7 + found["1f1b"].formula
    assert found["zb1p"].formula == 15 * (2 + 5 - 4)
    assert found["dualpipe"].formula == 7 * (6 + 5 - 6)
    assert found["dualpipev"].formula == 15 * (6 + 5 - 6) / 2
    assert found["dualpipev"].timeline.schedule.n_stages == 32
    for one in plan.schedules:
        assert one.lockstep >= one.timeline.makespan - 1e-9


def test_what_is_not_given_follows_from_the_forward_pass():
    config = replace(V3, mesh={"pipe": 2})
    given = plan_pipeline(config, PassTimes(forward=1.0, backward=2.0, weight=1.0), micro_batches=4)
    short = plan_pipeline(config, PassTimes(forward=1.0), micro_batches=4)
    assert len(given.schedules) == 5
    assert [one.timeline.makespan for one in given.schedules] == [one.timeline.makespan for one in short.schedules]


def test_costs_of_flops_have_the_mean_forward_pass_as_their_unit(published):
    assert published.micro_batches == 32
    assert published.tokens == 4096
    for one in published.schedules:
        assert sum(one.timeline.busy) == pytest.approx(16 * 32 * 3)


def test_schedules_that_cannot_be_are_told_and_left_out():
    plan = plan_pipeline(V3, micro_batches=31)
    assert [one.name for one in plan.schedules] == ["gpipe", "1f1b", "zb1p"]
    assert plan.refused == {
        "dualpipe": "dualpipe needs an even number of micro-batches, not 31: half of them from each end",
        "dualpipev": "dualpipev on 16 ranks needs 32 micro-batches at least, not 31",
    }


def test_memory_of_the_schedules(published):
    """GPipe keeps every micro-batch, ZB1P what its weight gradients need, DualPipe a second copy of the weights."""
    found = {one.name: one.memory for one in published.schedules}
    assert found["gpipe"].step["activations of MoE layers"] == 32 / 16 * found["1f1b"].step["activations of MoE layers"]
    assert found["1f1b"].step["weight gradients put off"] == 0 < found["zb1p"].step["weight gradients put off"]
    assert found["dualpipe"].step["gathered weights"] > found["1f1b"].step["gathered weights"]
    assert found["1f1b"].total < found["dualpipe"].total


def test_fewer_waiting_weight_gradients_take_less_memory_and_more_time(published):
    def dualpipe(plan):
        (found,) = (one for one in plan.schedules if one.name == "dualpipe")
        return found.memory.step["weight gradients put off"], found.timeline.makespan

    free = dualpipe(published)
    for waiting in (1, 0):
        size, time = dualpipe(plan_pipeline(replace(V3, train={"batch_size": 128 * 32}, mesh={"waiting": waiting})))
        assert size == free[0] * waiting / 8
        assert time > free[1]


def test_rings_of_the_plan_do_not_depend_on_more_micro_batches():
    for name in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        assert stages_of(V3.model, 4, name, 16) == stages_of(V3.model, 4, name, 4000)


def test_no_pipeline_and_a_schedule_that_cannot_be_are_one_line():
    with pytest.raises(ConfigError, match=r"mesh.pipe = 1 is no pipeline: give --mesh.pipe"):
        plan_pipeline(load_config("tiny"))
    with pytest.raises(
        ConfigError, match=r"mesh.schedule: dualpipe on 16 ranks needs 32 micro-batches at least, not 4"
    ):
        stages_of(V3.model, 16, "dualpipe", 4)
