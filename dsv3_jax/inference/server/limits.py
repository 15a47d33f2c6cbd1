"""What is turned away before a route sees it: bodies too large, and who has not the key."""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3_jax.inference.server.errors import ApiError


class Gate:
    """In front of the whole application.

    Args:
        app: the application.
        max_body: bytes of a request's body.
        api_key: what ``/v1`` wants as bearer token; None wants nothing.
    """

    def __init__(self, app: ASGIApp, max_body: int, api_key: str | None):
        self.app, self.max_body, self.api_key = app, max_body, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = body = None
        if scope["path"].startswith("/v1") and not self._has_key(headers):
            error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if error is None and (not length.isdecimal() or int(length) > self.max_body):
            error = self._too_large()
        if error is None:
            body = await self._body(receive)
            if body is None:
                error = self._too_large()
        if error is not None:
            await error.response()(scope, receive, send)
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    def _has_key(self, headers: Headers) -> bool:
        if self.api_key is None:
            return True
        given = headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self.api_key.encode())

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body} bytes", code="request_too_large")

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, which ``Content-Length`` may not have told; None where it is too large."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body:
                return None
            if not message.get("more_body"):
                return b"".join(parts)
