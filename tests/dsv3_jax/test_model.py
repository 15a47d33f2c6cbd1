"""The whole model against NumPy, its exact parameter counts, what sees what, and that depth costs no compile time."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ConfigError, ModelConfig, load_config, preset_folder
from dsv3_jax.model import DeepSeekV3, abstract_model, merge_model, split_model
from dsv3_jax.nn.router import Router, RouterBias
from dsv3_jax.planning import count_parameters
from tests.dsv3_jax import micro, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODELS = sorted(path.stem for path in (preset_folder() / "model").glob("*.toml"))

CASES = {
    "v3 with two depths and YaRN": micro.V3 | {"rope_scaling": micro.YARN, "num_nextn_predict_layers": 2},
    "v3 with MTP wired as printed and a tied head": micro.ROUTED_ONLY
    | {
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 2,
        "mtp_hidden": "pre_norm",
        "mtp_concat": "hidden_first",
        "tie_word_embeddings": True,
    },
    "v2_lite": micro.V2_LITE,
    "dense with grouped queries": micro.DENSE_GQA,
}


@functools.partial(jax.jit, static_argnums=0)
def heads(graph, params, bias, rows):
    """Logits of the main head and of each depth, for rows of T + 1 tokens, and the routing counts."""
    model = merge_model(graph, params, bias)
    hidden = model.hidden(rows)
    return [model.logits(state) for state in (hidden.main, *hidden.mtp)], hidden.aux


def logits_of(split, rows):
    return [np.asarray(head) for head in heads(split.graph, split.params, split.router_bias, jnp.asarray(rows))[0]]


@pytest.mark.parametrize("name", CASES)
def test_logits_of_every_head_and_expert_counts_equal_those_of_the_numpy_model(name):
    cfg = micro.config(CASES[name]).model
    split, rows = micro.parts(cfg), micro.tokens(cfg)
    found, aux = heads(split.graph, split.params, split.router_bias, jnp.asarray(rows))
    weights, counts = micro.published(split), 0
    for b, row in enumerate(rows):
        main, ahead, traces = reference.forward(row, weights, cfg)
        assert all(margin > 1e-5 for trace in traces for *_, margin in trace)
        assert len(found) == 1 + cfg.num_nextn_predict_layers == 1 + len(ahead)
        for ours, theirs in zip(found, (main, *ahead), strict=True):
            np.testing.assert_allclose(ours[b], theirs, atol=1e-5 * np.abs(theirs).max())
        chosen = [np.concatenate([experts for experts, *_ in trace]) for trace in traces]
        counts = counts + np.array([np.bincount(c, minlength=cfg.n_routed_experts) for c in chosen])
    if cfg.n_routed_experts:
        np.testing.assert_array_equal(aux.counts, counts)
    else:
        assert aux is None


V3 = micro.config(CASES["v3 with two depths and YaRN"]).model


@pytest.fixture(scope="module")
def v3():
    split, rows = micro.parts(V3), micro.tokens(V3)
    return split, rows, logits_of(split, rows)


def changed(rows, place):
    other = rows.copy()
    other[0, place] = (other[0, place] + 1) % V3.vocab_size
    return other


@pytest.mark.parametrize("place", [1, 6, 11])
def test_a_token_changes_main_logits_from_its_own_place_on_and_none_before(v3, place):
    split, rows, (main, *_) = v3
    after, *_ = logits_of(split, changed(rows, place))
    np.testing.assert_array_equal(after[0, :place], main[0, :place])
    assert (np.abs(after - main)[0, place:].max(-1) > 1e-5).all()


@pytest.mark.parametrize("place", [3, 7, 12])
def test_mtp_of_depth_k_at_i_reads_token_i_plus_k_and_not_the_one_it_predicts(v3, place):
    split, rows, (_, *ahead) = v3
    _, *after = logits_of(split, changed(rows, place))
    for depth in (1, 2):
        i, before, now = place - depth, ahead[depth - 1], after[depth - 1]
        np.testing.assert_array_equal(now[0, :i], before[0, :i])
        assert np.abs(now - before)[0, i].max() > 1e-3


def test_documents_packed_in_a_row_see_each_other_in_pretraining(v3):
    split, rows, _ = v3
    packed = rows.copy()
    packed[0, 5] = V3.eos_token_id
    first, second = (logits_of(split, r)[0][0, 6:] for r in (packed, changed(packed, 2)))
    assert (np.abs(first - second).max(-1) > 1e-5).all()


def test_calling_the_model_in_bfloat16_gives_nearly_the_main_logits():
    split, rows = micro.parts(V3, seed=1), micro.tokens(V3)
    model = merge_model(split.graph, split.params, split.router_bias)
    low = jax.jit(functools.partial(model, dtype=jnp.bfloat16))(rows[:, :-1])
    assert low.dtype == jnp.bfloat16
    # A rounding may send a single token to another expert, so the median over tokens is compared.
    exact = logits_of(split, rows)[0]
    error = np.linalg.norm(np.asarray(low, np.float32) - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 1e-3 < np.median(error) < 0.03


def sizes(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@functools.cache
def abstract_parts(name):
    return split_model(abstract_model(load_config(name, model_only=True).model))


def main_model(name):
    """Parameters of the main model and its router biases, MTP left out."""
    _, params, bias = abstract_parts(name)
    return sizes({k: v for k, v in params.items() if k != "mtp"}) + sizes({k: v for k, v in bias.items() if k != "mtp"})


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("deepseek_v3", 671_026_419_200),
        ("deepseek_v2", 235_741_434_880),
        ("deepseek_v2_lite", 15_706_484_224),
        ("deepseek_moe_16b", 16_375_728_128),
        ("deepseek_llm_7b", 6_910_365_696),
        ("deepseek_llm_67b", 67_425_001_472),
    ],
)
def test_the_published_models_have_their_exact_size(name, total):
    assert main_model(name) == total


def test_the_benchmark_model_has_the_peers_number_of_trainable_parameters():
    assert sizes(abstract_parts("bench_3b").params) == 3_736_011_776


def test_v3_has_the_exact_size_in_every_component():
    _, params, bias = abstract_parts("deepseek_v3")
    dense, moe, mtp = params["dense"], params["moe"], params["mtp"][0]
    assert sizes(dense["attention"]) == 3 * 187_107_328
    assert sizes(moe["attention"]) == 58 * 187_107_328
    for stack, layers in ((dense, 3), (moe, 58)):
        assert sizes((stack["attention_norm"], stack["ffn_norm"])) == layers * 14_336
    assert sizes(dense["ffn"]) == 3 * 396_361_728
    experts = moe["moe"]
    assert sizes((experts["gate_up"], experts["down"])) == 58 * 256 * 44_040_192
    assert sizes(experts["shared"]) == 58 * 44_040_192
    assert sizes((experts["router"], bias["moe"])) == 58 * 1_835_264
    assert sizes((experts, bias["moe"])) == 58 * 11_320_164_608
    assert sizes(params["embedding"]) == sizes(params["head"]) == 926_679_040
    assert sizes(params["final_norm"]) == 7168
    assert sizes((mtp, bias["mtp"])) == 11_610_068_224
    assert sizes(mtp["project"]) == 102_760_448
    assert sizes((mtp["block"], bias["mtp"])) == 11_507_286_272
    assert main_model("deepseek_v3") + sizes((mtp, bias["mtp"])) + 2 * 926_679_040 == 684_489_845_504


@pytest.mark.parametrize("name", MODELS)
def test_closed_forms_count_what_the_model_holds(name):
    counts = count_parameters(load_config(name, model_only=True).model)
    _, params, bias = abstract_parts(name)
    assert main_model(name) == counts.total
    assert sizes(params) == counts.trainable
    assert sizes(bias) == counts.router_bias + counts.mtp_router_bias
    assert {leaf.dtype for leaf in jax.tree.leaves((params, bias))} == {jnp.dtype(jnp.float32)}


def test_embedding_and_head_are_one_array_each_whatever_the_depth_of_mtp():
    _, params, _ = split_model(abstract_model(dataclasses.replace(V3, num_nextn_predict_layers=3)))
    wide = [path for path, leaf in jax.tree.leaves_with_path(params) if V3.vocab_size in leaf.shape]
    assert [jax.tree_util.keystr(path[:1], simple=True) for path in wide] == ["embedding", "head"]


def test_a_tied_head_is_no_parameter_of_its_own():
    _, params, _ = split_model(abstract_model(dataclasses.replace(V3, tie_word_embeddings=True)))
    assert "head" not in params


def test_an_architecture_that_cannot_be_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^model\.num_experts_per_tok = 9 must be at most .* = 8$"):
        abstract_model(dataclasses.replace(V3, num_experts_per_tok=9))


def test_a_module_of_ones_own_can_stand_in_for_the_router():
    class Alternating(Router):
        """Sends token t to experts t and t + 1, whatever it says."""

        def __call__(self, x):
            routing = super().__call__(x)
            first = jnp.arange(x.shape[1])[None, :, None] + jnp.arange(3)
            return routing._replace(experts=jnp.broadcast_to(first % 8, routing.experts.shape))

    def counts(rows):
        model = DeepSeekV3(micro.config(micro.V3).model, rngs=nnx.Rngs(0), router=Alternating)
        return model.hidden(rows).aux.counts

    np.testing.assert_array_equal(jax.jit(counts)(np.zeros((2, 9), np.int32)), [[6] * 8] * 3)


def test_router_biases_are_their_own_kind_of_variable_outside_the_parameters():
    graph, params, bias = nnx.split(nnx.eval_shape(lambda: DeepSeekV3(V3, rngs=nnx.Rngs(0))), nnx.Param, RouterBias)
    assert sizes(bias) == (2 + V3.num_nextn_predict_layers) * 8
    assert not any("bias" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params))
    del graph


def test_the_program_of_v3_does_not_grow_with_depth():
    lines = {}
    for layers in (11, 61):
        config = dataclasses.replace(load_config("deepseek_v3").model, num_hidden_layers=layers)
        graph, params, bias = split_model(abstract_model(config))

        def loss(params, bias, tokens, graph=graph):
            hidden, aux, _ = merge_model(graph, params, bias).trunk(tokens, dtype=jnp.bfloat16, remat="full")
            return jnp.sum(hidden.astype(jnp.float32)), aux.counts

        tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
        lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(params, bias, tokens)
        assert lowered.out_info[1].shape == (layers - 3, 256)
        lines[layers] = lowered.as_text().count("\n")
    assert lines[61] == lines[11] > 500


def test_default_configuration_is_a_model():
    assert sizes(split_model(abstract_model(ModelConfig())).params) > 1_000_000
