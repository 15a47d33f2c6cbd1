"""The memory plan against what it predicts: the model's arrays, the traced program's residuals, XLA's own figures."""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ConfigError, load_config, replace
from dsv3_jax.model import abstract_model, split_model
from dsv3_jax.nn import moe
from dsv3_jax.nn.balance import balance_loss
from dsv3_jax.nn.block import run_blocks, stack_blocks
from dsv3_jax.planning.activations import block_rows
from dsv3_jax.planning.fit import remedy
from dsv3_jax.planning.memory import plan_memory
from dsv3_jax.planning.shapes import parameter_shapes, router_bias_shapes
from dsv3_jax.planning.stages import stages_of
from dsv3_jax.train.ema import abstract_average
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import TrainStep
from pallas_kernels.attention import op as attention_op
from sharding.expert_parallel import ExpertParallel
from sharding.mesh import AXES, make_mesh
from tests.dsv3_jax import micro

TIED = micro.DENSE_GQA | {"tie_word_embeddings": True}
MODELS = {"V3": micro.V3, "V2-Lite": micro.V2_LITE, "GQA": micro.DENSE_GQA, "tied": TIED, "routed": micro.ROUTED_ONLY}
LAYERS = 3


@pytest.fixture
def attention_in_chunks(monkeypatch):
    """Attention that keeps no scores, as cuDNN's does."""
    whole = attention_op.xla.causal_attention
    monkeypatch.setattr(
        attention_op.xla, "causal_attention", lambda *given, **named: whole(*given, **named, max_scores=1)
    )


def flat(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in _leaves(tree)}


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_model(name):
    config = micro.config(MODELS[name]).model
    parts = split_model(abstract_model(config))
    assert parameter_shapes(config) == flat(parts.params)
    assert router_bias_shapes(config) == flat(parts.router_bias)


@pytest.mark.parametrize(("rows", "experts"), [(7, 4), (8, 4), (100, 4), (5000, 4), (64, 1)])
def test_blocks_of_rows_are_chosen_as_the_layer_does(rows, experts):
    assert block_rows(rows, experts, gpu=False) == moe.block_rows(rows, experts)


def bytes_of(avals):
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)


def scans(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns") and equation.primitive.name != "scan":
                    yield from scans(inner)


def traced_residuals(config, *, moe_blocks):
    """Bytes a layer that the forward scan over layers stacks for the backward one, routing records left out."""
    mesh_config, model = config.mesh, config.model
    placement = ExpertParallel(mesh_config.expert, mesh_config.transport)
    blocks = nnx.eval_shape(lambda: stack_blocks(model, LAYERS, moe=moe_blocks, rngs=nnx.Rngs(0)))
    moe.place_experts(blocks, placement)
    graph, params, rest = nnx.split(blocks, nnx.Param, ...)
    balance = functools.partial(balance_loss, loss=config.loss) if moe_blocks else None
    tokens = config.train.seq_len
    sequences = config.train.batch_size // (mesh_config.expert * mesh_config.data)

    def loss(params, rest, x):
        positions = jnp.broadcast_to(jnp.arange(tokens), x.shape[:2])
        block = nnx.merge(graph, params, rest)
        y, aux, _ = run_blocks(block, x, positions, balance=balance, remat=config.train.remat)
        return jnp.sum(y.astype(jnp.float32)) + (jnp.sum(aux.balance_loss) if aux else 0.0)

    gradient = jax.grad(loss, argnums=(0, 2))
    if placement.size > 1:
        mesh = make_mesh(expert=placement.size)
        split = nnx.to_pure_dict(params)
        specs = jax.tree_util.tree_map_with_path(
            lambda path, leaf: P(None, "expert") if path[0].key == "moe" and leaf.ndim == 4 else P(), split
        )
        whole = gradient

        def gradient(params, rest, x):
            local = jax.shard_map(
                lambda given, rest, x: nnx.to_pure_dict(whole(nnx.State(given), rest, x)[0]),
                mesh=mesh,
                in_specs=(specs, P(), P()),
                out_specs=specs,
                check_vma=False,
            )
            return local(nnx.to_pure_dict(params), rest, x)

    dtype = jnp.float32 if config.train.precision == "fp32" else jnp.bfloat16
    x = jax.ShapeDtypeStruct((sequences, tokens, model.hidden_size), dtype)
    jaxpr = jax.make_jaxpr(gradient)(params, rest, x).jaxpr
    over_layers = next(scan for scan in scans(jaxpr) if scan.params["length"] == LAYERS)
    inner = [one.aval for one in over_layers.params["jaxpr"].jaxpr.outvars]
    outer = [one.aval for one in over_layers.outvars]
    stacked = [out for out, one in zip(outer, inner, strict=True) if out.shape != one.shape]
    records = 4 + 4 * model.n_routed_experts if moe_blocks else 0
    return bytes_of(stacked) // LAYERS - records


def planned(config, kind):
    return sum(plan_memory(config, gpu=False).kept[kind].values())


@pytest.mark.parametrize(
    ("model", "kind", "precision", "remat"),
    [
        ("V3", "moe", "bf16", "none"),
        ("routed", "moe", "fp32", "none"),
        ("V3", "moe", "bf16", "paper"),
        ("V3", "dense", "bf16", "full"),
        ("V2-Lite", "moe", "bf16", "none"),
        ("GQA", "dense", "bf16", "none"),
        ("GQA", "dense", "bf16", "paper"),
    ],
)
def test_a_layer_keeps_what_the_plan_says_to_the_byte(attention_in_chunks, model, kind, precision, remat):
    config = micro.config(MODELS[model], train={"precision": precision, "remat": remat, "batch_size": 2})
    assert planned(config, kind) == traced_residuals(config, moe_blocks=kind == "moe")


@pytest.mark.parametrize(
    ("transport", "remat", "slack"),
    [
        pytest.param("two_hop", "paper", 0, marks=pytest.mark.slow),
        ("counted", "paper", 0),
        pytest.param("counted", "none", 0.01, marks=pytest.mark.slow),
        pytest.param("two_hop", "none", 0.01, marks=pytest.mark.slow),
        pytest.param("padded", "none", 0.01, marks=pytest.mark.slow),
        pytest.param("ring", "none", 0.01, marks=pytest.mark.slow),
    ],
)
def test_transports_keep_what_the_plan_says(attention_in_chunks, transport, remat, slack):
    config = micro.config(
        train={"precision": "bf16", "remat": remat, "seq_len": 64}, mesh={"expert": 4, "transport": transport}
    )
    assert planned(config, "moe") == pytest.approx(traced_residuals(config, moe_blocks=True), rel=slack)


def step_arguments(config, mesh):
    """Shapes and places of everything that the compiled step is called with, the host's numbers as arrays."""
    arrays, rows, scalars = TrainStep(config, mesh).abstract_arguments()
    whole = NamedSharding(mesh, P())
    return arrays, rows, [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=whole) for one in scalars[:4]]


def local_bytes(arguments):
    leaves = jax.tree.leaves(arguments)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def lower(config, mesh, **options):
    step = TrainStep(config, mesh)
    return step.jitted.trace(*step.abstract_arguments()).lower(**options)


@pytest.mark.parametrize("axes", [(1, 1), (1, 4), (4, 2), (2, 4)])
def test_a_device_s_state_is_exact_on_every_mesh(axes):
    config = micro.config(
        train={"ema_decay": 0.9, "micro_batch_size": 1, "batch_size": 16},
        mesh={"expert": axes[0], "data": axes[1]},
    )
    mesh = make_mesh(1, *axes)
    assert plan_memory(config).arguments == local_bytes(step_arguments(config, mesh))


DEEP = micro.V3 | {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 65,
    "intermediate_size": 96,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
"""Many layers and tokens for so few parameters: what layers keep outweighs what one layer needs while it works."""
DEEP_DENSE = DEEP | {
    "attention": "mha",
    "head_dim": 16,
    "n_routed_experts": 0,
    "n_shared_experts": 0,
}


def deep(model, remat, expert=1, data=1):
    return micro.config(
        model,
        train={"seq_len": 256, "batch_size": 4 * expert * data, "micro_batch_size": 4, "remat": remat},
        mesh={"expert": expert, "data": data},
    )


def check_against_xla(config, monkeypatch, below):
    whole = attention_op.xla.causal_attention
    monkeypatch.setattr(
        attention_op.xla, "causal_attention", lambda *given, **named: whole(*given, **named, max_scores=1 << 14)
    )
    mesh = make_mesh(1, config.mesh.expert, config.mesh.data)
    found = lower(config, mesh).compile().memory_analysis()
    plan = plan_memory(config, gpu=False)
    unused = 0 if config.model.n_routed_experts else 8  # two scalars that a dense model has no use for
    assert found.argument_size_in_bytes == plan.arguments - unused
    # Every buffer of the state is used again.
    assert found.alias_size_in_bytes == plan.arguments - 16 - plan.state["batch"]
    # On a CPU nothing fuses across operations, and a layer's own passing arrays are more than planned.
    assert found.temp_size_in_bytes * (1 - below) <= plan.temporaries <= found.temp_size_in_bytes * 1.01


@pytest.mark.usefixtures("quick_compilation")
def test_xla_plans_the_same_memory(monkeypatch):
    check_against_xla(deep(DEEP_DENSE, "none", data=4), monkeypatch, below=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("remat", "expert", "data", "below"),
    [("none", 1, 1, 0.03), ("none", 1, 4, 0.03), ("none", 4, 2, 0.03), ("paper", 1, 1, 0.06), ("full", 1, 1, 0.2)],
)
def test_xla_plans_the_same_memory_for_experts(monkeypatch, remat, expert, data, below):
    check_against_xla(deep(DEEP, remat, expert, data), monkeypatch, below)


def v3_layer():
    return load_config(
        "deepseek_v3",
        {
            "model": {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
            "train": {"batch_size": 2048, "batch_ramp": [], "remat": "none", "precision": "bf16"},
            "mesh": {"expert": 64, "data": 32},
        },
    )


def entries(text):
    return sum(math.prod(map(int, dims.split("x"))) for dims in re.findall(r"tensor<([\dx]+)x[a-z]\w*>", text))


def test_a_v3_layer_lowers_for_2048_devices_and_each_holds_what_the_plan_says():
    config = v3_layer()
    mesh = AbstractMesh((1, 64, 32), AXES, axis_types=(AxisType.Auto,) * 3)
    text = lower(config, mesh, lowering_platforms=("cuda",)).as_text()
    plan = plan_memory(config)
    assert local_bytes(step_arguments(config, mesh)) == pytest.approx(plan.arguments, rel=0.02)
    (body,) = re.findall(r"sdy\.manual_computation.*?manual_axes=\{[^}]*\} \((.*?)\) \{\n", text)
    local = [(dims, kind) for dims, kind in re.findall(r"tensor<((?:\d+x)*)([a-z]+\d+)>", body)]
    sizes = {"f32": 4, "bf16": 2, "i32": 4}
    total = sum(math.prod(int(dim) for dim in dims.split("x") if dim) * sizes[kind] for dims, kind in local)
    assert total == pytest.approx(plan.arguments, rel=0.02)
    gathered = [line.rpartition("->")[2] for line in text.splitlines() if "stablehlo.all_gather" in line]
    assert 4 * sum(map(entries, gathered)) == pytest.approx(plan.step["gathered weights"], rel=0.02)


def test_accumulation_holds_a_second_set_of_gradients():
    once = plan_memory(micro.config(train={"batch_size": 8}))
    twice = plan_memory(micro.config(train={"batch_size": 8, "micro_batch_size": 4}))
    assert once.step["gradients of a micro-batch"] == 0
    assert twice.step["gradients of a micro-batch"] == twice.step["gradients"]


@pytest.mark.parametrize(
    ("schedule", "stored", "held", "chunk", "under_way"),
    [("1f1b", 4, 4, 4, 16), ("zb1p", 4, 4, 4, 16), ("dualpipe", 4, 8, 4, 17), ("dualpipev", 4, 4, 2, 33)],
)
def test_stages_of_v3_on_sixteen_ranks(schedule, stored, held, chunk, under_way):
    found = stages_of(load_config("deepseek_v3").model, 16, schedule, 120)
    assert (found.stored, found.held, found.chunk, found.under_way) == (stored, held, chunk, under_way)


def test_fewer_micro_batches_than_stages_keep_fewer_activations():
    model = load_config("deepseek_v3").model
    assert stages_of(model, 16, "1f1b", 3).under_way == 3


def test_dualpipe_s_mirror_copy_is_held_but_not_stored():
    config = load_config("deepseek_v3", {"mesh": {"cluster": "h800_2048"}}, trainable=False)
    one_way, both = plan_memory(config, schedule="1f1b"), plan_memory(config, schedule="dualpipe")
    assert one_way.arguments == both.arguments
    mirrored = 4 * (4 * 3 * 7168 * 2048 + 187_107_328 + 44_040_192 + 256 * 7168 + 2 * 7168)  # four slots
    assert both.step["gradients"] - one_way.step["gradients"] == 4 * mirrored


def test_a_pipeline_longer_than_the_layers_is_refused():
    config = replace(load_config("tiny"), mesh={"pipe": 9})
    with pytest.raises(ConfigError, match=r"mesh.pipe = 9 must be at most the 3 mixture-of-experts layers"):
        plan_memory(config)


@pytest.mark.parametrize(
    ("gigabytes", "share", "words"),
    [
        (100, 0.75, "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"),
        (83, 0.91, "train.micro_batch_size = 4 would take"),
        (75, 0.85, "train.remat = 'paper' would take"),
        (30, 0.75, "enlarge mesh.pipe = 1, mesh.expert = 1, mesh.data = 1"),
    ],
)
def test_what_does_not_fit_names_what_to_change(gigabytes, share, words):
    config = replace(load_config("bench_3b"), train={"batch_size": 8, "micro_batch_size": 8})
    plan = plan_memory(config)
    line = remedy(config, plan, int(gigabytes * 1e9), share, "dualpipe") or ""
    assert "\n" not in line
    assert words in line
    assert remedy(config, plan, plan.total, 1.0, "dualpipe") is None


def test_what_does_not_fit_may_name_weight_gradients_that_wait():
    config = load_config("deepseek_v3", {"mesh": {"cluster": "h800_2048", "waiting": -1}})
    words = "mesh.waiting = {} and XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 would take"
    assert words.format(0) in (remedy(config, plan_memory(config), 80 * 10**9, 0.75) or "")
    assert words.format(1) in (remedy(config, plan_memory(config), 92 * 10**9, 0.75) or "")


@pytest.mark.parametrize(
    ("precision", "remat", "sequences", "peak"),
    [
        ("bf16", "none", 4, 56.00),
        ("bf16", "none", 8, 74.71),
        ("bf16", "paper", 4, 50.49),
        ("bf16", "paper", 8, 53.97),
        ("bf16", "full", 4, 49.54),
        ("bf16", "full", 8, 51.00),
        ("fp8", "none", 4, 47.94),
        ("fp8", "none", 8, 58.54),
        ("fp8", "paper", 4, 46.46),
        ("fp8", "paper", 8, 49.23),
        ("fp8", "full", 4, 47.30),
        ("fp8", "full", 8, 49.37),
    ],
)
def test_peaks_of_an_h200_are_within_four_percent(precision, remat, sequences, peak):
    """GiB; docs/performance.md. Measured, but for ``full`` and ``paper`` with 4: what XLA allocates for an H200."""
    changes = {"precision": precision, "remat": remat, "batch_size": sequences, "micro_batch_size": sequences}
    config = replace(load_config("bench_3b"), train=changes)
    assert config.train.unroll
    assert plan_memory(config).total / 2**30 == pytest.approx(peak, rel=0.04)


@pytest.mark.parametrize(
    ("precision", "unroll", "mesh", "sequences", "total"),
    [
        ("bf16", True, {"data": 2}, 8, 44.75),
        ("bf16", True, {"data": 2}, 16, 60.00),
        ("bf16", False, {"data": 2}, 16, 77.91),
        ("fp8", True, {"data": 2}, 16, 54.24),
        ("bf16", True, {"expert": 2, "data": 4}, 32, 39.80),
        ("bf16", True, {"expert": 2, "data": 4}, 64, 48.80),
    ],
)
def test_shares_and_several_micro_batches_are_within_four_percent(precision, unroll, mesh, sequences, total):
    """GB a device of ``bench_3b``, 4 sequences a micro-batch: what XLA allocates for H200s (``dsv3 plan compile``)."""
    train = {"precision": precision, "unroll": unroll, "batch_size": sequences}
    config = load_config("bench_3b", {"mesh": mesh, "train": train})
    assert config.train.micro_batch_size == 4
    assert plan_memory(config).total / 1e9 == pytest.approx(total, rel=0.04)


def test_unrolled_layers_have_gradients_in_place_of_activations():
    tree = {"model": micro.V3, "train": {"precision": "bf16", "remat": "paper", "seq_len": 256}}
    looped, unrolled = (
        plan_memory(micro.config(tree["model"], train=tree["train"] | {"unroll": unroll})) for unroll in (False, True)
    )
    assert unrolled.kept == looped.kept
    largest = max(looped.step["gradients"], looped.step["activations of MoE layers"])
    assert largest < unrolled.temporaries
    assert unrolled.temporaries - unrolled.step["weights, cast"] < looped.temporaries - looped.step["gradients"] / 2


@pytest.mark.parametrize("unroll", [False, True])
def test_the_moving_average_is_in_host_memory_and_what_it_is_made_of_on_the_device(unroll):
    changes = {"train": {"micro_batch_size": 1, "batch_size": 16, "unroll": unroll}, "mesh": {"expert": 2, "data": 4}}
    without = plan_memory(micro.config(**changes))
    plan = plan_memory(micro.config(**changes | {"train": changes["train"] | {"ema_decay": 0.9, "ema_every": 4}}))
    assert without.host == {"EMA": 0, "a share of it on its way": 0, "a copy of it, being saved": 0}
    assert plan.state == without.state
    share = plan.state["masters"]
    assert plan.host == {"EMA": share, "a share of it on its way": share // 4, "a copy of it, being saved": share}
    travelling = plan.step["EMA: copied parameters, two shares"]
    assert travelling == plan.temporaries - without.temporaries == share + 2 * (share // 4)
    config = micro.config(**changes | {"train": changes["train"] | {"ema_decay": 0.9}})
    state = abstract_state(config)
    assert local_bytes(abstract_average(config)) == local_bytes(state.params) == share


def test_numbers_add_up():
    plan = plan_memory(load_config("tiny"))
    assert plan.total == plan.arguments + plan.temporaries
    assert all(np.asarray([*plan.state.values(), *plan.step.values()]) >= 0)
