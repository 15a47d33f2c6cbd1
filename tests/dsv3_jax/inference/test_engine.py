"""What a request gets depends on nothing but the request: not on who runs beside it, nor on pages, drafts or pauses."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.inference import Engine, EngineOptions, Sampling, programs

PROMPTS = [[5, 17, 3], [11], list(range(40, 60)), [8, 8, 90, 2, 61, 33, 7], [70] * 9, list(range(30, 57))]
NEW = 30


def finish(engine, requests):
    sequences = [engine.add(prompt, sampling) for prompt, sampling in requests]
    engine.run()
    assert engine.blocks.held == 0
    return [sequence.new for sequence in sequences]


def one_by_one(engine_of, requests, **changes):
    return [finish(engine_of(**changes), [request])[0] for request in requests]


def greedy(**how):
    return [(prompt, Sampling(NEW, stop_tokens=(), **how)) for prompt in PROMPTS]


WARM = [(prompt, Sampling(NEW, temperature=0.6, seed=row, stop_tokens=())) for row, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def forward(engine_model):
    """``tokens [128] -> logits`` without a cache."""
    compute = jax.jit(lambda tokens: engine_model(tokens)[0])
    return lambda tokens: np.asarray(compute(np.pad(np.array(tokens, np.int32), (0, 128 - len(tokens)))[None]))


@pytest.fixture(scope="module")
def expected(forward):
    """Greedy text by whole forward passes, one token at a time."""
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW):
            scores = forward(tokens)[len(tokens) - 1]
            second, first = np.sort(scores)[-2:]
            assert first - second > 1e-4  # so that rounding decides no token
            tokens.append(int(scores.argmax()))
        found.append(tokens[len(prompt) :])
    return found


def test_side_by_side_drafted_and_set_aside_the_text_is_that_of_recomputation(engine_of, expected):
    engine = engine_of(share_prefixes=False)
    assert finish(engine, greedy()) == expected
    counts = engine.counts
    assert counts.preemptions > 0
    assert counts.read_tokens > counts.prompt_tokens  # some was read again
    assert 0.1 < counts.acceptance < 1
    assert counts.written_tokens == len(PROMPTS) * NEW
    assert counts.finished == {"stop": 0, "length": len(PROMPTS), "cancelled": 0}
    assert one_by_one(engine_of, greedy()) == expected


def test_with_latents_in_fp8_text_depends_on_its_request_alone_too(engine_of, expected):
    """A token's codes are its own: of no chunk that it was read in, no draft beside it and no pause."""
    engine = engine_of(cache_dtype="fp8", share_prefixes=False)
    together = finish(engine, greedy())
    assert engine.counts.preemptions > 0
    assert together[2:4] == one_by_one(engine_of, greedy()[2:4], cache_dtype="fp8")
    same = np.mean(np.array(together) == np.array(expected))
    assert 0.3 < same < 1, "near float32, and not it"


def test_drawn_text_depends_on_its_seed_alone(engine_of):
    """With drafts too: who is set aside takes them along."""
    engine = engine_of()
    together = finish(engine, WARM)
    assert engine.counts.preemptions > 0
    assert engine.counts.acceptance > 0.1
    assert engine.counts.shared_tokens == 0  # what it finds of its own after a pause does not count
    assert together[3:] == one_by_one(engine_of, WARM[3:])
    other = [(prompt, dataclasses.replace(sampling, seed=99)) for prompt, sampling in WARM]
    assert all(a != b for a, b in zip(finish(engine_of(), other), together, strict=True))


def test_greedy_text_beside_drawn_text_is_greedy(engine_of, expected):
    assert finish(engine_of(), [greedy()[0], WARM[1], greedy()[2], WARM[3]])[::2] == expected[:3:2]


def test_a_prompt_that_begins_as_another_shares_its_pages_and_nothing_changes(engine_of, expected):
    engine = engine_of()
    prompt = PROMPTS[5]
    for times in range(3):
        assert finish(engine, [(prompt, Sampling(NEW, stop_tokens=()))]) == [expected[5]]
        # 27 tokens: 6 pages of which the next token is known too.
        assert engine.counts.shared_tokens == times * 24
    longer = [*prompt, *expected[5][:6]]
    assert finish(engine, [(longer, Sampling(NEW - 6, stop_tokens=()))]) == [expected[5][6:]]
    assert engine.counts.shared_tokens == 2 * 24 + 32
    assert finish(engine_of(share_prefixes=False), greedy()[5:]) == [expected[5]]


def test_nothing_is_compiled_once_every_kind_of_request_came(engine_of):
    engine = engine_of()
    engine.runner.compile()
    known = programs.read._cache_size(), programs.write._cache_size()
    rng = np.random.default_rng(0)
    for count in (1, 2, 7):
        for temperature in (0.0, 0.8):
            requests = [
                (
                    rng.integers(0, 300, rng.integers(1, 40)).tolist(),
                    Sampling(int(rng.integers(1, 20)), temperature, top_p=0.9, top_k=int(rng.integers(0, 9))),
                )
                for _ in range(count)
            ]
            finish(engine, requests)
    assert (programs.read._cache_size(), programs.write._cache_size()) == known


def test_log_probabilities_and_penalties_are_those_of_the_whole_forward_pass(engine_of, forward):
    prompt, penalties = PROMPTS[3], {"presence_penalty": 0.3, "frequency_penalty": 0.2, "repetition_penalty": 1.3}
    sequence = (engine := engine_of()).add(prompt, Sampling(12, logprobs=3, stop_tokens=(), **penalties))
    engine.run()
    plain = one_by_one(engine_of, greedy())[3][:12]
    assert sequence.new != plain
    tokens = list(prompt)
    for told in sequence.logprobs:
        logits = forward(tokens)[len(tokens) - 1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-logprobs)[:3]
        assert [token for token, _ in told.best] == best.tolist()
        np.testing.assert_allclose([p for _, p in told.best], logprobs[best], atol=1e-4)
        assert told.logprob == pytest.approx(logprobs[told.token], abs=1e-4)
        new = np.bincount(tokens[len(prompt) :], minlength=300)
        seen = np.bincount(tokens, minlength=300) > 0
        logits = np.where(seen, np.where(logits > 0, logits / 1.3, logits * 1.3), logits)
        assert told.token == np.argmax(logits - 0.2 * new - 0.3 * (new > 0))
        tokens.append(told.token)
    assert tokens == sequence.tokens
    assert len(sequence.logprobs) == 12


def test_a_stop_token_and_a_stop_text_end_a_text_and_are_left_out(engine_of, expected, tokenizer):
    text = expected[2]
    cut = text.index(text[9])
    engine = engine_of()
    by_token = engine.add(PROMPTS[2], Sampling(NEW, stop_tokens=(text[9],)))
    whole = tokenizer.decode(text)
    part = whole[5:8]
    by_text = engine.add(PROMPTS[2], Sampling(NEW, stop_tokens=(), stop=(part,)))
    told = {by_token.number: "", by_text.number: ""}
    while engine.busy:
        for news in engine.step():
            told[news.sequence.number] += news.text
    assert by_token.new == text[:cut]
    assert told[by_token.number] == tokenizer.decode(text[:cut])
    assert told[by_text.number] == whole[: whole.index(part)]
    assert by_token.finish == by_text.finish == "stop"


def test_a_text_ends_where_the_engines_sequences_end(engine_of):
    engine = engine_of()
    sequence = engine.add([7] * 124, Sampling(NEW, stop_tokens=()))
    engine.run()
    assert (len(sequence.new), sequence.finish) == (4, "length")


def test_cancelled_requests_leave_nothing_behind_and_change_nothing(engine_of, expected):
    engine = engine_of()
    sequences = [engine.add(prompt, sampling) for prompt, sampling in greedy() * 2]
    for _ in range(3):
        engine.step()
    for sequence in sequences[1::2]:
        engine.cancel(sequence)
        engine.cancel(sequence)
    engine.run()
    assert [sequence.new for sequence in sequences[::2]] == [expected[row % 6] for row in range(0, 12, 2)]
    assert {sequence.finish for sequence in sequences[1::2]} == {"cancelled"}
    assert engine.counts.finished["cancelled"] == 6
    assert engine.blocks.held == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_batch": 0}, "max_batch = 0"),
        ({"max_tokens": 129}, "max_tokens = 129 must be between 2 and model.max_position_embeddings = 128"),
        ({"cache_tokens": 127}, "cache_tokens = 127 must hold one sequence"),
        ({"token_budget": 4}, "token_budget = 4 must be greater than max_batch = 4"),
        ({"drafts": -1}, "drafts = -1"),
    ],
)
def test_options_that_do_not_fit_are_one_line(engine_of, changes, told):
    with pytest.raises(ConfigError) as caught:
        engine_of(**changes)
    assert told in str(caught.value)


def test_drafts_without_an_mtp_module_are_one_line(toy, drawn_model):
    with pytest.raises(ConfigError, match="drafts = 1 needs an MTP module"):
        Engine(drawn_model(toy()), None, EngineOptions(max_batch=1, drafts=1))


@pytest.mark.parametrize(
    ("prompt", "how", "told"),
    [
        ([], {}, "the prompt is empty"),
        ([300], {}, "token 300"),
        ([1] * 128, {}, "the prompt has 128 tokens"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ([1], {"min_p": 1.5}, "min_p = 1.5"),
        ([1], {"top_k": -1}, "top_k = -1"),
        ([1], {"presence_penalty": 3.0}, "presence_penalty = 3.0"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ([1], {"logprobs": 21}, "logprobs = 21"),
        ([1], {"stop": ("",)}, "empty text"),
        ([1], {"stop_tokens": (1, 2, 3, 4, 5)}, "at most 4"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(engine_of, prompt, how, told):
    with pytest.raises(ConfigError) as caught:
        engine_of().add(prompt, Sampling(**{"max_new_tokens": 4} | how))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_drafted_tokens_that_are_drawn_have_the_models_distribution(engine_of, forward):
    """The second token of many texts, which was drafted, after the most frequent first one."""
    prompt, temperature, count = PROMPTS[0], 0.4, 480
    engine = engine_of()
    asked = [Sampling(2, temperature, choice=choice, stop_tokens=()) for choice in range(count)]
    texts = finish(engine, [(prompt, sampling) for sampling in asked])
    assert engine.counts.proposed >= count
    first = int(np.bincount([text[0] for text in texts]).argmax())
    for before, tokens in (([], [text[0] for text in texts]), ([first], [b for a, b in texts if a == first])):
        logits = forward([*prompt, *before])[len(prompt) + len(before) - 1].astype(np.float64) / temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
        best = np.argsort(-p)[:4]
        expected = len(tokens) * np.append(p[best], 1 - p[best].sum())
        found = [tokens.count(token) for token in best]
        found.append(len(tokens) - sum(found))
        assert len(tokens) > 60
        assert np.sum((np.array(found) - expected) ** 2 / np.maximum(expected, 1e-9)) < 18.47  # 4 degrees of freedom
