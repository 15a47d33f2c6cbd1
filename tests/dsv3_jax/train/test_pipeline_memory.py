"""The memory plan of a pipeline against the traced program of DeepSeek-V3 on 2,048 devices; nothing is allocated."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType

from dsv3_jax.config import load_cluster, load_config
from dsv3_jax.planning.memory import plan_memory
from dsv3_jax.train import pipeline
from dsv3_jax.train.step import TrainStep
from sharding.mesh import AXES

LOOPED = ("moe", "dense")
WAITS = "weight gradients put off"


def bytes_of(tree):
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def whiles(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from whiles(inner)


def abstract_step(config):
    sizes = config.mesh.pipe, config.mesh.expert, config.mesh.data
    return TrainStep(config, AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def traced(config, monkeypatch):
    """The traced step, and by the plan's names the bytes that its loop over ticks carries and the weights it reads."""
    seen = {}
    whole = pipeline.execute

    def execute(tick, plan, rows, ticks, memory, message):
        seen.update(weights=tick.__self__._weights, memory=memory, ring=(plan, bytes_of(message)))
        return whole(tick, plan, rows, ticks, memory, message)

    monkeypatch.setattr(pipeline, "execute", execute)
    step = abstract_step(config)
    program = step.jitted.trace(*step.abstract_arguments())
    memory, weights, (table, message) = seen["memory"], seen["weights"], seen["ring"]
    messages = table.slots.activation + table.slots.gradient + 2 * table.lag
    found = {
        "gradients": bytes_of([memory["grads"], *[memory[name]["grads"] for name in LOOPED]]),
        "activations of MoE layers": bytes_of(memory["moe"]["kept"]),
        "activations of dense layers": bytes_of(memory["dense"]["kept"]),
        WAITS: bytes_of(memory["moe"]["late"]),
        "messages between stages": bytes_of(memory["raw"]) + messages * message,
    }
    records = bytes_of([memory["losses"], *[memory[name]["record"] for name in LOOPED]])
    carries = [bytes_of([var.aval for var in loop.params["body_jaxpr"].outvars]) for loop in whiles(program.jaxpr)]
    assert sum(found.values()) + records <= max(carries) <= sum(found.values()) + records + 64
    flat, _ = jax.tree.flatten_with_path(weights.params)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    read = [leaf for name, leaf in names.items() if name not in weights.codes]
    return program, found | {"gathered weights": bytes_of(read), "weights, cast": bytes_of(weights.codes)}


def v3(**changes):
    return load_config("deepseek_v3", {"mesh": {"cluster": "h800_2048"}} | changes)


@pytest.mark.parametrize(
    ("precision", "remat", "mesh", "slack"),
    [
        ("fp8", "full", {"waiting": 1}, 0.01),
        pytest.param("bf16", "full", {"waiting": 1}, 0.001, marks=pytest.mark.slow),
        pytest.param("bf16", "paper", {"waiting": -1}, 0.001, marks=pytest.mark.slow),
        pytest.param("bf16", "paper", {"schedule": "zb1p", "waiting": 2}, 0.001, marks=pytest.mark.slow),
        pytest.param("bf16", "full", {"schedule": "dualpipev", "waiting": -1}, 0.001, marks=pytest.mark.slow),
        pytest.param(
            "fp8", "full", {"schedule": "1f1b", "transport": "two_hop", "lag": 2}, 0.01, marks=pytest.mark.slow
        ),
    ],
)
def test_ticks_carry_what_the_plan_says(precision, remat, mesh, slack, monkeypatch):
    config = v3(train={"precision": precision, "remat": remat}, mesh={"cluster": "h800_2048"} | mesh)
    _, found = traced(config, monkeypatch)
    plan = plan_memory(config, gpu=False)
    for name, size in found.items():
        assert plan.step.get(name, 0) == pytest.approx(size, rel=slack if name == WAITS else 1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_deepseek_v3_with_dualpipe_lowers_for_2048_devices_and_fits_them(precision, monkeypatch, capsys):
    config = v3(train={"precision": precision})
    assert config.mesh.schedule == "dualpipe"
    program, found = traced(config, monkeypatch)
    assert "stablehlo.collective_permute" in program.lower(lowering_platforms=("cpu",)).as_text()
    plan = plan_memory(config)
    state = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract_step(config).abstract_arguments()[:2])
    )
    assert state == pytest.approx(plan.arguments, rel=1e-4)
    beside = plan.temporaries - sum(plan.step.get(name, 0) for name in found)
    total = state + sum(found.values()) + beside
    with capsys.disabled():
        print(f"\nDeepSeek-V3 in {precision}, GB a device: state {state / 1e9:.2f}, carried and read by ticks")
        print(", ".join(f"{name} {size / 1e9:.2f}" for name, size in found.items()))
        print(f"beside these, by the plan, {beside / 1e9:.2f}; all {total / 1e9:.2f}")
    assert total < 0.95 * 1e9 * load_cluster(config.mesh.cluster).memory_gb
