"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """What goes wrong with one request, told to who asked.

    Args:
        status: of HTTP.
        message: one line.
        param: the field at fault.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """The error object."""
        error = {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """It as a response."""
        return JSONResponse(self.body(), self.status, self.headers)


def _kind(status: int) -> str:
    known = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
    return known.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
