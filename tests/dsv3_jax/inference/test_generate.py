"""Text by cache is the text of full recomputation, in both forms, alone or in a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ConfigError, RopeScaling
from dsv3_jax.inference import contiguous_cache, generate, programs
from dsv3_jax.model import split_model
from dsv3_jax.nn.cache import LayerCache
from dsv3_jax.nn.mha import MHA
from dsv3_jax.nn.mla import MLA

LENGTH, NEW = 32, 16
MODELS = {
    # V3: query compression, sigmoid routing in groups with biases, YaRN, a dense layer before the experts.
    "v3": {"rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)},
    # V2: no query compression, softmax routing in groups by their best expert, two shared experts, llama's RoPE layout.
    "v2": {
        "first_k_dense_replace": 0,
        "q_lora_rank": 0,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "n_shared_experts": 2,
        "rope_interleave": False,
        "routed_scaling_factor": 1.0,
    },
    # The dense LLM: grouped queries.
    "gqa": {"attention": "mha", "num_attention_heads": 4, "num_key_value_heads": 2, "n_routed_experts": 0},
    # MoE-16B: as many key heads as query heads.
    "mha": {"attention": "mha"},
}
# Alone or together their programs are of one shape: 16 tokens a chunk, 32 slots.
PROMPTS = [[5, 17, 3], [11], list(range(40, 56)), [8, 8, 90, 2, 61, 33, 7]]


@pytest.fixture(scope="module")
def models(toy, drawn_model):
    return {name: drawn_model(toy(**changes)) for name, changes in MODELS.items()}


@pytest.fixture(scope="module")
def forward(models):
    """``(name, tokens [4, 32]) -> logits`` without a cache, compiled once a model."""
    known = {}

    def compute(name, tokens):
        if name not in known:
            graph, state = nnx.split(models[name])
            known[name] = jax.jit(lambda tokens: nnx.merge(graph, state)(tokens))
        return np.asarray(known[name](tokens))

    return compute


@pytest.fixture(scope="module")
def recomputed(forward):
    """``name -> (new tokens of PROMPTS, smallest margin)`` by whole forward passes without a cache."""
    known = {}

    def compute(name):
        if name not in known:
            tokens = np.zeros((len(PROMPTS), LENGTH), np.int32)
            for row, prompt in enumerate(PROMPTS):
                tokens[row, : len(prompt)] = prompt
            margin = np.inf
            for step in range(NEW):
                logits = forward(name, tokens)
                for row, prompt in enumerate(PROMPTS):
                    scores = logits[row, len(prompt) + step - 1]
                    second, first = np.sort(scores)[-2:]
                    margin = min(margin, float(first - second))
                    tokens[row, len(prompt) + step] = np.argmax(scores)
            new = [tokens[row, len(p) : len(p) + NEW].tolist() for row, p in enumerate(PROMPTS)]
            known[name] = (new, margin)
        return known[name]

    return compute


@pytest.mark.parametrize(
    ("name", "form"),
    [("v3", "absorbed"), ("v3", "naive"), ("v2", "absorbed"), ("gqa", "naive")],
)
def test_text_is_that_of_recomputation_without_cache(models, recomputed, name, form):
    expected, margin = recomputed(name)
    assert margin > 1e-4  # so that rounding decides no token
    assert len({token for row in expected for token in row}) > 10  # not one token over and over
    assert generate(models[name], PROMPTS, max_new_tokens=NEW, form=form, eos_id=-1) == expected


def test_a_prompt_alone_gets_the_text_it_gets_in_a_batch(models, recomputed):
    expected, _ = recomputed("v2")
    for prompt, new in zip(PROMPTS, expected, strict=True):
        assert generate(models["v2"], prompt, max_new_tokens=NEW, eos_id=-1) == [new]


def test_each_sequence_ends_at_eos_which_is_left_out(models, recomputed):
    expected, _ = recomputed("gqa")
    eos = expected[0][4]
    cut = [row[: row.index(eos)] if eos in row else row for row in expected]
    assert len(cut[0]) <= 4
    assert len({len(row) for row in cut}) > 1
    assert generate(models["gqa"], PROMPTS, max_new_tokens=NEW, form="naive", eos_id=eos) == cut


def test_the_models_own_eos_is_the_default(models, recomputed):
    expected, _ = recomputed("gqa")
    target = next(token for token in expected[2] if token > 1)
    graph, params, bias = split_model(models["gqa"])
    # EOS (id 1) gets the logits of another token and, having the lower id, is drawn in its place.
    kernel = params["head"]["kernel"]
    params["head"]["kernel"] = kernel.at[:, 1].set(kernel[:, target])
    model = nnx.merge(graph, nnx.State(params), nnx.State(bias))
    new = generate(model, [PROMPTS[2]] * 4, max_new_tokens=NEW, form="naive")
    assert new[0] == expected[2][: expected[2].index(target)]


def test_a_sequence_ends_where_its_positions_end(models):
    short, long = generate(models["gqa"], [PROMPTS[0], PROMPTS[2]] * 2, max_new_tokens=20, form="naive", eos_id=-1)[:2]
    assert (len(short), len(long)) == (20, 32 - len(PROMPTS[2]))


def test_seeds_reproduce_and_differ(models):
    def text(seed, top_p=1.0, prompts=PROMPTS):
        settings = {"max_new_tokens": NEW, "form": "naive", "eos_id": -1, "temperature": 1.0, "top_p": top_p}
        return generate(models["gqa"], prompts, seed=seed, **settings)

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(1) != text(1, top_p=0.5)
    same_prompt = text(1, prompts=[PROMPTS[2]] * 4)
    assert len({tuple(row) for row in same_prompt}) == 4


def test_a_tiny_nucleus_is_greedy(models, recomputed):
    expected, _ = recomputed("gqa")
    settings = {"max_new_tokens": NEW, "form": "naive", "eos_id": -1, "temperature": 1.0, "top_p": 1e-6}
    assert generate(models["gqa"], PROMPTS, **settings) == expected


def test_drawn_text_of_the_first_prompt_is_the_same_without_the_others(models):
    settings = {"max_new_tokens": NEW, "eos_id": -1, "temperature": 1.0, "seed": 3}
    prompts = [PROMPTS[2], *PROMPTS]
    together = generate(models["v2"], prompts[:4], **settings)
    assert generate(models["v2"], prompts[0], **settings) == together[:1]


def test_lengths_of_one_bucket_share_their_programs(models):
    generate(models["gqa"], PROMPTS, max_new_tokens=NEW, form="naive", temperature=1.0)
    before = programs.read._cache_size(), programs.write._cache_size()
    for prompts, new in (([[1, 2], [3], [4] * 15], 8), ([[9] * 17] * 4, 15), ([[7] * 17, [6], [5]], 1)):
        generate(models["gqa"], prompts, max_new_tokens=new, temperature=0.5, top_p=0.9, seed=new, form="naive")
    assert (programs.read._cache_size(), programs.write._cache_size()) == before


def test_arrays_are_prompts_too(models, recomputed):
    expected, _ = recomputed("gqa")
    settings = {"max_new_tokens": NEW, "form": "naive", "eos_id": -1}
    prompts = np.array([PROMPTS[2]] * 4)
    assert generate(models["gqa"], prompts, **settings) == [expected[2]] * 4
    assert generate(models["gqa"], jnp.asarray(prompts), **settings) == [expected[2]] * 4


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([], {}, ["empty"]),
        ([[]], {}, ["prompt 0", "empty"]),
        ([[1], []], {}, ["prompt 1", "empty"]),
        ([1, 97], {}, ["prompt 0", "97", "vocab_size"]),
        ([[1], [-1]], {}, ["prompt 1", "-1", "vocab_size"]),
        ([[1.5]], {}, ["prompt 0", "token ids"]),
        ([[[1], [2]]], {}, ["prompt 0", "token ids"]),
        ([[1] * 33], {}, ["prompt 0", "33", "max_position_embeddings = 32"]),
        ([[1] * 32], {}, ["32", "at most 31"]),
        ([1], {"max_new_tokens": 0}, ["max_new_tokens = 0"]),
        ([1], {"temperature": -0.1}, ["temperature = -0.1"]),
        ([1], {"temperature": float("nan")}, ["temperature = nan"]),
        ([1], {"top_p": 0.0}, ["top_p = 0.0"]),
        ([1], {"top_p": 1.5}, ["top_p = 1.5"]),
        ([1], {"seed": -1}, ["seed = -1"]),
    ],
)
def test_a_mistake_is_one_line(models, prompts, settings, words):
    with pytest.raises(ConfigError) as caught:
        generate(models["gqa"], prompts, **{"max_new_tokens": 4} | settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_logits_by_cache_are_those_of_the_whole_forward_pass_at_every_position(models, forward):
    """Property 2, with the absorbed form behind a prompt read in the naive one."""
    model = models["v3"]
    graph, state = nnx.split(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (4, LENGTH)), jnp.int32)
    read = 5

    @jax.jit
    def by_cache(state):
        model = nnx.merge(graph, state)
        cache = contiguous_cache(model.config, 4, LENGTH, jnp.float32)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        start, _, cache = model.trunk(tokens[:, :read], positions[:, :read], cache=cache)

        def one(cache, at):
            token, position = tokens[:, at][:, None], positions[:, at][:, None]
            hidden, _, cache = model.trunk(token, position, cache=cache, form="absorbed")
            return cache, hidden[:, 0]

        _, rest = jax.lax.scan(one, cache, jnp.arange(read, LENGTH))
        return model.logits(model.final_norm(jnp.concatenate([start, jnp.swapaxes(rest, 0, 1)], axis=1)))

    whole = forward("v3", np.asarray(tokens))
    assert np.std(whole) > 0.5
    np.testing.assert_allclose(by_cache(state), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["v3", "v2"])
def test_absorbed_attention_is_naive_attention(models, name):
    """Property 1, rows of a batch at positions of their own."""
    attention, x, positions, cache = attention_inputs(models[name].config, MLA)
    outputs = {form: attention(x, positions, cache, form)[0] for form in ("naive", "absorbed")}
    assert float(jnp.std(outputs["naive"])) > 0.1
    assert float(jnp.max(jnp.abs(outputs["naive"] - outputs["absorbed"]))) < 1e-5


@pytest.mark.parametrize(("name", "kind"), [("v2", MLA), ("mha", MHA)])
def test_attention_by_cache_is_attention_over_the_whole_sequence(models, name, kind):
    """Property 2, a layer at a time: five tokens at once, then one by one."""
    config = models[name].config
    attention, _, _, _ = attention_inputs(config, kind)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 32)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    whole, _ = attention(x, positions, None, "naive")
    cache = LayerCache(*contiguous_cache(config, 2, 12, jnp.float32), 1)
    got, cache = attention(x[:, :5], positions[:, :5], cache, "naive")
    parts = [got]
    for at in range(5, 9):
        got, cache = attention(x[:, at : at + 1], positions[:, at : at + 1], cache, "naive")
        parts.append(got)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)


def attention_inputs(config, kind):
    """A layer with random weights, compiled; three query tokens a sequence; a cache full of random tokens."""
    rng = np.random.default_rng(7)
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), state)
    call = jax.jit(lambda *inputs: nnx.merge(graph, state)(*inputs), static_argnums=3)
    pages, table = contiguous_cache(config, 2, 12, jnp.float32)
    pages = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), pages)
    x = jnp.asarray(rng.normal(size=(2, 3, 32)), jnp.float32)
    return call, x, jnp.array([[4, 5, 6], [9, 10, 11]]), LayerCache(pages, table, 1)
