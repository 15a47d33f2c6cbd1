"""The routes: OpenAI's completions and chat completions over one engine, health and metrics."""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from dsv3_jax.config import ConfigError
from dsv3_jax.data.chat import encode_chat
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.sequence import Sequence
from dsv3_jax.inference.server.answers import Answer
from dsv3_jax.inference.server.errors import ApiError
from dsv3_jax.inference.server.limits import Gate
from dsv3_jax.inference.server.metrics import RequestCounts, render
from dsv3_jax.inference.server.protocol import ChatRequest, CompletionRequest
from dsv3_jax.inference.server.worker import EngineFailed, Full, Ticket, Worker

_DEFAULT_COMPLETION = 16
"""Tokens of a text completion that names no number, as OpenAI's."""


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Limits, and what is told."""

    model_name: str = "dsv3"
    api_key: str | None = None
    """What ``/v1`` wants as bearer token."""
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    max_new_tokens: int = 4096
    """Tokens that one choice may write."""
    max_waiting: int = 128
    """Sequences that may stand in line behind those that run."""
    max_seconds: float = 600.0
    """How long a request may take, its reader's pauses among them."""
    thinking: bool = False
    """Whether chats open with a thought where they do not say."""


class _Server:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: ServerOptions):
        self.engine, self.tokenizer, self.options = engine, tokenizer, options
        self.worker = Worker(engine, options.max_waiting)
        self.requests = RequestCounts()
        self.created = int(time.time())

    async def completions(self, asked: CompletionRequest, request: Request) -> Response:
        prompts = [
            (self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]) if isinstance(prompt, str) else prompt
            for prompt in asked.prompts()
        ]
        new = self._limit("max_tokens", asked.max_tokens or _DEFAULT_COMPLETION)
        return await self._answer(asked, request, prompts, new, asked.logprobs, chat=False, thinking=False)

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        thinking = asked.chat_template_kwargs.thinking
        thinking = self.options.thinking if thinking is None else thinking
        prompt = encode_chat(self.tokenizer, [message.plain() for message in asked.messages], thinking=thinking)
        wanted = asked.max_completion_tokens or asked.max_tokens
        new = self._limit("max_tokens", wanted) if wanted else self.options.max_new_tokens
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs")
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        return await self._answer(asked, request, [prompt], new, logprobs, chat=True, thinking=thinking)

    def _limit(self, name: str, wanted: int) -> int:
        most = self.options.max_new_tokens
        if wanted > most:
            raise ApiError(400, f"{name} = {wanted} is greater than the server's {most}", param=name)
        return wanted

    async def _answer(
        self,
        asked: CompletionRequest | ChatRequest,
        request: Request,
        prompts: list[list[int]],
        new: int,
        logprobs: int | None,
        *,
        chat: bool,
        thinking: bool,
    ) -> Response:
        seed = secrets.randbits(32)
        sequences = [
            self.engine.prepare(prompt, asked.sampling(new, seed, place * asked.n + choice, logprobs))
            for place, prompt in enumerate(prompts)
            for choice in range(asked.n)
        ]
        ticket = self._submit(sequences)
        request.state.ticket = ticket
        answer = Answer(chat, asked.model or self.options.model_name, self.tokenizer, sequences, thinking)
        if asked.stream:
            events = self._events(answer, ticket, asked.with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await self._whole(answer, ticket, request)

    def _submit(self, sequences: list[Sequence]) -> Ticket:
        try:
            return self.worker.submit(sequences)
        except Full:
            raise ApiError(
                429, "too many requests are waiting", code="queue_full", headers={"Retry-After": "1"}
            ) from None
        except EngineFailed as error:
            raise ApiError(503, str(error), code="engine_failed") from None

    async def _whole(self, answer: Answer, ticket: Ticket, request: Request) -> Response:
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            async with asyncio.timeout(self.options.max_seconds):
                while ticket.open:
                    coming = asyncio.ensure_future(ticket.next())
                    await asyncio.wait((coming, gone), return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        coming.cancel()
                        return Response(status_code=499)  # nobody is left to read it
                    answer.take(coming.result())
        except TimeoutError:
            raise self._timeout() from None
        except EngineFailed as error:
            raise ApiError(503, str(error), code="engine_failed") from None
        finally:
            gone.cancel()
            self._done(ticket)
        return JSONResponse(answer.whole())

    async def _events(self, answer: Answer, ticket: Ticket, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events; an error comes as the last of them, for the status is long told."""
        try:
            async with asyncio.timeout(self.options.max_seconds):
                while ticket.open:
                    for piece in answer.chunk(await ticket.next()):
                        yield _event(piece | {"usage": None} if with_usage else piece)
                if with_usage:
                    yield _event(answer.usage_chunk())
                yield "data: [DONE]\n\n"
        except TimeoutError:
            yield _event(self._timeout().body())
        except EngineFailed as error:
            yield _event(ApiError(503, str(error), code="engine_failed").body())
        finally:
            self._done(ticket)

    def _timeout(self) -> ApiError:
        return ApiError(408, f"the request took longer than {self.options.max_seconds:g} s", code="timeout")

    def _done(self, ticket: Ticket) -> None:
        if ticket.open:
            self.worker.cancel(ticket)
        if ticket.first:
            self.requests.add_first_token(ticket.first)

    def models(self) -> dict[str, Any]:
        card = {"id": self.options.model_name, "object": "model", "created": self.created, "owned_by": "dsv3-jax"}
        return {"object": "list", "data": [card | {"max_model_len": self.engine.max_tokens}]}

    def health(self) -> JSONResponse:
        if self.worker.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})


def make_app(engine: Engine, options: ServerOptions | None = None) -> FastAPI:
    """The application; the engine runs in a thread of its own while it is up.

    Args:
        engine: with a tokenizer; nobody else may step it.
        options: limits, and what is told.

    Raises:
        ConfigError: the engine has no tokenizer.
    """
    if engine.tokenizer is None:
        raise ConfigError("a server needs an engine with a tokenizer")
    options = options or ServerOptions()
    server = _Server(engine, engine.tokenizer, options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        await asyncio.to_thread(server.worker.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    app.add_middleware(Gate, max_body=options.max_body, api_key=options.api_key)

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Any]) -> Response:
        began = time.monotonic()
        response = await call_next(request)
        if request.url.path.startswith("/v1/"):
            server.requests.add(response.status_code, time.monotonic() - began)
        return response

    app.post("/v1/completions")(server.completions)
    app.post("/v1/chat/completions")(server.chat)
    app.get("/v1/models")(server.models)
    app.get("/health")(server.health)
    app.get("/metrics")(lambda: PlainTextResponse(render(server.worker, server.requests)))
    _tell_errors(app)
    return app


def _tell_errors(app: FastAPI) -> None:
    """Everything that goes wrong, as OpenAI's error object."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(ConfigError)
    async def config_error(request: Request, error: ConfigError) -> Response:
        return ApiError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is not JSON", code="invalid_json").response()
        names = [str(name) for name in first["loc"] if name != "body"]
        param = names[0] if names else None
        told = "the field is not known" if first["type"] == "extra_forbidden" else first["msg"]
        return ApiError(400, f"{'.'.join(names) or 'body'}: {told}", param=param).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed on this request").response()


def _event(piece: dict[str, Any]) -> str:
    return f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
