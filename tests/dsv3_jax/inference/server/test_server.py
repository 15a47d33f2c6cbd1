"""The official client gets what the engine writes, and every mistake as an OpenAI error."""

import http.client
import json
import threading

import numpy as np
import openai
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data.chat import encode_chat
from dsv3_jax.inference import Engine, EngineOptions, Sampling
from dsv3_jax.inference.server import ServerOptions, make_app

PROMPT = "def add("
CHAT = [{"role": "user", "content": "def add(a, b):"}]


@pytest.fixture(scope="module")
def written(engine_of):
    """``(ids, new, **how) -> (sequence, text)`` by an engine alone."""

    def write(ids, new, **how):
        engine = engine_of()
        sequence, text = engine.add(ids, Sampling(new, **how)), ""
        while engine.busy:
            text += "".join(news.text for news in engine.step())
        return sequence, text

    return write


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer.encode(PROMPT)


def complete(server, **asked):
    return server.client.completions.create(
        **{"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | asked
    )


def chat(server, **asked):
    asked = {"model": "m", "messages": CHAT, "max_tokens": 8, "temperature": 0} | asked
    return server.client.chat.completions.create(**asked)


def test_a_completion_is_what_the_engine_writes(server, written, ids):
    sequence, text = written(ids, 8)
    answer = complete(server)
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.object, answer.model) == ("text_completion", "m")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(ids), 8, len(ids) + 8)
    assert sequence.finish == "length"


def test_prompts_may_be_several_and_ids(server, written, ids):
    texts = [written(prompt, 4)[1] for prompt in (ids, [5, 6, 7])]
    answer = complete(server, prompt=[ids, [5, 6, 7]], max_tokens=4, n=2)
    assert [choice.text for choice in answer.choices] == [texts[0]] * 2 + [texts[1]] * 2
    assert answer.usage.prompt_tokens == len(ids) + 3
    assert complete(server, prompt=ids, max_tokens=4).choices[0].text == texts[0]
    assert complete(server, prompt=[PROMPT, PROMPT], max_tokens=4).choices[1].text == texts[0]


def test_a_stream_adds_up_to_the_whole(server, written, ids):
    _, text = written(ids, 8)
    pieces = list(complete(server, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == text
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage.completion_tokens == 8
    assert all(piece.usage is None for piece in pieces[:-1])


def test_a_chat_is_the_templates_prompt(server, written, tokenizer):
    _, text = written(encode_chat(tokenizer, CHAT), 8)
    answer = chat(server)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    pieces = list(chat(server, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    assert pieces[-1].choices[0].finish_reason == "length"
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    assert chat(server, messages=parts).choices[0].message.content == text


def test_a_thought_comes_apart_from_the_answer(server, written, tokenizer):
    _, text = written(encode_chat(tokenizer, CHAT, thinking=True), 8)
    asked = {"extra_body": {"chat_template_kwargs": {"thinking": True}}}
    message = chat(server, **asked).choices[0].message
    assert (message.reasoning_content, message.content) == (text, "")
    pieces = list(chat(server, stream=True, **asked))
    thought = "".join(getattr(piece.choices[0].delta, "reasoning_content", None) or "" for piece in pieces)
    assert thought == text


def test_a_stop_text_ends_the_answer(server, written, ids):
    _, text = written(ids, 8)
    answer = complete(server, stop=["never", text[4:6]])
    assert answer.choices[0].text == text[: text.index(text[4:6])]
    assert answer.choices[0].finish_reason == "stop"
    assert (
        "".join(piece.choices[0].text for piece in complete(server, stop=text[4:6], stream=True))
        == answer.choices[0].text
    )


def test_a_seed_draws_the_same_and_choices_differ(server):
    drawn = {"temperature": 1.5, "seed": 7, "n": 3, "max_tokens": 6}
    first, again = ([choice.text for choice in complete(server, **drawn).choices] for _ in range(2))
    assert first == again
    assert len(set(first)) == 3
    assert [choice.text for choice in complete(server, **drawn | {"seed": 8}).choices] != first
    assert complete(server, temperature=1.5).choices[0].text != complete(server, temperature=1.5).choices[0].text


def test_log_probabilities_are_the_engines(server, written, ids, tokenizer):
    sequence, _ = written(ids, 5, logprobs=2)
    told = complete(server, max_tokens=5, logprobs=2).choices[0].logprobs
    np.testing.assert_allclose(told.token_logprobs, [one.logprob for one in sequence.logprobs], atol=1e-5)
    assert [len(best) for best in told.top_logprobs] == [2] * 5
    assert told.text_offset[0] == 0
    content = chat(server, max_tokens=3, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    for one in content:
        assert one.top_logprobs[0].token == one.token  # greedy
        assert bytes(one.bytes).decode("utf-8", errors="replace") == one.token
        assert one.logprob < 0
    streamed = list(chat(server, max_tokens=3, logprobs=True, top_logprobs=1, stream=True))
    assert sum(len(piece.choices[0].logprobs.content) for piece in streamed if piece.choices[0].logprobs) == 3


def test_the_model_is_told(server):
    (card,) = server.client.models.list().data
    assert (card.id, card.max_model_len) == ("dsv3", 128)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt": "a" * 200}, "the prompt has"),
        ({"prompt": [5, 300]}, "token 300"),
        ({"prompt": []}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens = 5000 is greater than the server's 4096"),
        ({"temperature": -1}, "temperature"),
        ({"n": 99}, "n:"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"extra_body": {"tempratur": 1}}, "tempratur: the field is not known"),
    ],
)
def test_a_mistake_is_a_400_that_names_the_field(server, asked, told):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, **asked)
    error = caught.value.body
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "content must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: the field is not known"),
    ],
)
def test_so_is_one_in_a_chat(server, asked, told):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, **asked)
    assert told in caught.value.body["message"]


def raw(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"\xff\xfe", 400),
        ("POST", "/v1/completions", b"[]", 400),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/chat/completions", b'{"messages": ' + b"[" * 5000, 400),
        ("POST", "/v1/nothing", b"{}", 404),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/completions", b" " * ((1 << 20) + 1), 413),
    ],
)
def test_what_is_no_request_gets_an_error_object_too(server, method, path, body, status):
    found, text = raw(server, method, path, body, {"Content-Type": "application/json"})
    assert found == status
    assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


HALF = "a\ud800"


@pytest.mark.parametrize(
    ("route", "asked", "told", "param"),
    [
        ("", {"prompt": HALF}, "prompt holds half a surrogate pair at character 1", "prompt"),
        ("", {"prompt": ["a", HALF]}, "prompt[1] holds", "prompt"),
        ("", {"prompt": "a", "stop": HALF}, "stop holds", "stop"),
        ("", {"prompt": "a", "stop": ["b", HALF]}, "stop[1] holds", "stop"),
        ("", {"prompt": "a", "model": HALF}, "model holds", "model"),
        ("", {"prompt": "a", HALF: 1}, "the name of a field of the body holds", None),
        ("", HALF, "the body holds", None),
        ("chat/", {"messages": [{"role": "user", "content": HALF}]}, "messages[0].content holds", "messages"),
        (
            "chat/",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
            "messages[0].content[0].text holds",
            "messages",
        ),
        (
            "chat/",
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": HALF}}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments.x holds",
            "messages",
        ),
    ],
)
def test_half_a_surrogate_pair_is_a_400_that_says_where(server, route, asked, told, param):
    body = json.dumps(asked).encode()
    status, text = raw(server, "POST", f"/v1/{route}completions", body, {"Content-Type": "application/json"})
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (400, param)
    assert told in error["message"]


def test_a_whole_surrogate_pair_is_a_character(server):
    body = b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}'
    assert raw(server, "POST", "/v1/completions", body, {"Content-Type": "application/json"})[0] == 200


def test_a_body_that_does_not_tell_its_length_is_measured(server):
    chunks = iter([b" " * (1 << 19)] * 3)
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/v1/completions", chunks, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_health_and_metrics_are_told(server):
    assert raw(server, "GET", "/health") == (200, '{"status":"ok"}')
    complete(server)
    status, text = raw(server, "GET", "/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["dsv3_generated_tokens_total"]) >= 8
    assert float(values['dsv3_requests_total{status="200"}']) >= 1
    assert float(values["dsv3_first_token_seconds_count"]) >= 1
    assert values["dsv3_pages_held"] == "0"


def test_a_reader_who_leaves_frees_what_it_held(server, settled):
    before = server.engine.counts.finished["cancelled"]
    stream = complete(server, max_tokens=100, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        complete(server, max_tokens=100, timeout=0.002)
    settled(server)
    assert server.engine.counts.finished["cancelled"] > before


def test_without_the_key_nothing_is_answered(served):
    with served(api_key="secret") as server:
        assert complete(server, max_tokens=1).choices
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer sécret".encode("latin-1")}):
            status, text = raw(server, "POST", "/v1/completions", b"{}", headers)
            assert status == 401
            assert json.loads(text)["error"]["code"] == "invalid_api_key"
        assert raw(server, "GET", "/health")[0] == 200


def test_a_line_too_long_is_a_429_and_time_too_short_a_408(served, settled):
    with served(max_waiting=0, max_seconds=0.001) as server:
        with pytest.raises(openai.RateLimitError) as full:
            complete(server, n=5)
        assert full.value.body["code"] == "queue_full"
        with pytest.raises(openai.APIStatusError) as late:
            complete(server, max_tokens=100)
        assert (late.value.status_code, late.value.body["code"]) == (408, "timeout")
        with pytest.raises(openai.APIError, match="took longer"):
            list(complete(server, max_tokens=100, stream=True))
        settled(server)


def test_an_engine_that_fails_is_told_and_not_waited_for(served, engine_of, monkeypatch):
    engine = engine_of()
    step, failing = engine.step, threading.Event()

    def broken():
        if failing.is_set():
            raise MemoryError
        return step()

    monkeypatch.setattr(engine, "step", broken)
    with served(engine) as server:
        assert complete(server, max_tokens=1).choices
        failing.set()
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as caught:
                complete(server)
            assert caught.value.body["code"] == "engine_failed"
        assert raw(server, "GET", "/health")[0] == 503


def test_an_engine_without_a_tokenizer_serves_nobody(toy, drawn_model):
    engine = Engine(drawn_model(toy(n_routed_experts=0)), None, EngineOptions(max_batch=1))
    with pytest.raises(ConfigError, match="needs an engine with a tokenizer"):
        make_app(engine, ServerOptions())
