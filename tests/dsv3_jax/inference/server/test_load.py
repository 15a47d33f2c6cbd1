"""Sixty-four clients at once, many of them ill-mannered: right tokens for the others, and nothing lost."""

import asyncio
import json
import random
import resource
import time

import openai
import pytest

CLIENTS = 64
PROMPTS = [
    "def ",
    "def add(a",
    "return a + b",
    "a, b, a, b, a",
    "(((",
    "add(a, b):\n    return",
    "d",
    "def add(a, b):\n",
]
LENGTHS = (3, 9, 24)


@pytest.fixture(scope="module")
def expected(engine_of, tokenizer):
    """Greedy text of every prompt and length, written before."""
    from dsv3_jax.inference import Sampling

    engine, found = engine_of(), {}
    asked = {
        engine.add(tokenizer.encode(prompt), Sampling(length)): (prompt, length)
        for prompt in PROMPTS
        for length in LENGTHS
    }
    while engine.busy:
        for news in engine.step():
            key = asked[news.sequence]
            found[key] = found.get(key, "") + news.text
    return found


class Client:
    """One user; every mistake of the server's is an exception."""

    def __init__(self, number, api, running, expected):
        self.rng, self.api, self.running, self.expected = random.Random(number), api, running, expected
        self.done = dict.fromkeys(("right", "left", "refused", "busy"), 0)

    async def live(self, until):
        manners = (self.whole, self.whole, self.stream, self.slow, self.leave, self.vanish, self.malformed, self.large)
        while time.monotonic() < until:
            await self.rng.choice(manners)()
        return self.done

    def ask(self):
        prompt, length = self.rng.choice(PROMPTS), self.rng.choice(LENGTHS)
        asked = {"model": "m", "prompt": prompt, "max_tokens": length, "temperature": 0}
        return asked, self.expected[prompt, length]

    async def create(self, asked):
        """The answer, or None where the line is full."""
        try:
            return await self.api.completions.create(**asked)
        except openai.RateLimitError:
            self.done["busy"] += 1
            await asyncio.sleep(self.rng.random() / 4)
            return None

    async def whole(self):
        asked, text = self.ask()
        if answer := await self.create(asked):
            assert answer.choices[0].text == text
            self.done["right"] += 1

    async def stream(self, pause=0.0):
        asked, text = self.ask()
        if answer := await self.create(asked | {"stream": True}):
            pieces = []
            async for piece in answer:
                pieces.append(piece.choices[0].text)
                await asyncio.sleep(pause)
            assert "".join(pieces) == text
            self.done["right"] += 1

    async def slow(self):
        await self.stream(pause=0.05)

    async def leave(self):
        """Read a little of a long answer."""
        asked, _ = self.ask()
        if answer := await self.create(asked | {"stream": True, "max_tokens": 90}):
            async for _ in answer:
                if self.rng.random() < 0.5:
                    break
            await answer.close()
            self.done["left"] += 1

    async def vanish(self):
        """Do not wait for the answer."""
        asked, _ = self.ask()
        try:
            await asyncio.wait_for(self.create(asked | {"max_tokens": 90}), self.rng.random() / 5)
        except TimeoutError:
            self.done["left"] += 1

    async def malformed(self):
        body = self.rng.choice(
            [b"{", b'{"prompt": 3}', b'{"prompt": "a", "no": 1}', b"\xff", b'{"prompt": "' + b"a" * 999]
        )
        await self.raw(body, (400,))

    async def large(self):
        await self.raw(b" " * 70_000, (413,))

    async def raw(self, body, statuses):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.running.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        try:
            writer.write(head.encode() + body)
            told = await reader.read()
        except ConnectionError:  # what is refused is not read to its end
            return
        finally:
            writer.close()
        if told:
            first, _, rest = told.partition(b"\r\n\r\n")
            assert int(first.split()[1]) in statuses, first
            assert json.loads(rest)["error"]["type"] == "invalid_request_error"
            self.done["refused"] += 1


def load(running, expected, seconds):
    """What all clients together got done."""

    async def everybody():
        url = running.url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as api:
            until = time.monotonic() + seconds
            clients = [Client(number, api, running, expected) for number in range(CLIENTS)]
            return await asyncio.gather(*(client.live(until) for client in clients))

    done = asyncio.run(everybody())
    return {what: sum(one[what] for one in done) for what in done[0]}


def under_load(served, settled, expected, seconds):
    # Its cache holds a quarter of what four long sequences take: some are set aside.
    with served(max_body=65_536, max_waiting=40) as running:
        running.engine.runner.compile()
        yield load(running, expected, seconds / 3)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield load(running, expected, seconds * 2 / 3)
        yield resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / before
        settled(running)
        assert running.worker.failure is None
        answer = running.client.completions.create(model="m", prompt=PROMPTS[1], max_tokens=9, temperature=0)
        assert answer.choices[0].text == expected[PROMPTS[1], 9]


def check(served, settled, expected, seconds):
    first, then, growth = under_load(served, settled, expected, seconds)
    done = {what: first[what] + then[what] for what in first}
    assert all(done.values()), done
    return done, growth


def test_a_few_seconds_of_it(served, settled, expected):
    check(served, settled, expected, 6)


@pytest.mark.slow
def test_ten_minutes_of_it_in_flat_memory(served, settled, expected):
    done, growth = check(served, settled, expected, 600)
    print(done, f"memory grew {growth:.3f} times")
    assert growth < 1.05
    assert done["right"] > 2000
