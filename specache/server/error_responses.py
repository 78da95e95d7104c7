"""Errors of the API, in the shape of OpenAI's or of Anthropic's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from specache.errors import (
    ConfigError,
    FastMemoryError,
    GrammarError,
    OutOfMemoryError,
    QueueFullError,
    ServiceClosedError,
    SpeCacheError,
    UnsupportedModelError,
    UsageError,
)
from specache.server.dialects import Dialect
from specache.server.request_context import RequestContext
from specache.server.settings import MOST_HEADER_BYTES, MOST_HEADERS
from specache.templates.template import PromptError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {**_TYPES, 413: "request_too_large", 503: "overloaded_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An error that a request is answered with.

    Args:
        status: the HTTP status.
        message: says what was wrong and what to do.
        code: a word for programs, such as `context_length_exceeded`.
        param: the field of the request that is meant.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})


def error_document(error: ApiError, context: RequestContext) -> dict[str, Any]:
    """Return an error as JSON, in the shape of the API that the request speaks."""
    if context.dialect is Dialect.ANTHROPIC:
        message = error.message if not error.param or error.param in error.message else f"{error.param}: {error.message}"
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": context.request_id}
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError, context: RequestContext) -> JSONResponse:
    """Return the answer of a request that an error ended."""
    return JSONResponse(error_document(error, context), error.status, error_headers(error, context))


def error_headers(error: ApiError, context: RequestContext) -> dict[str, str]:
    """Return the headers of an answer with an error, beyond those of any JSON."""
    request_id = {"request-id": context.request_id} if context.dialect is Dialect.ANTHROPIC else {}
    return {**error.headers, **request_id}


def busy(message: str, retry_after_s: float = 1.0) -> ApiError:
    """Return the error of a request that came when there was no room."""
    return ApiError(429, message, code="busy", headers={"Retry-After": str(max(1, math.ceil(retry_after_s)))})


def headers_too_large() -> ApiError:
    """Return the error of a request with more headers than are read."""
    return ApiError(431, f"The headers may have {MOST_HEADER_BYTES:,} bytes in {MOST_HEADERS} lines.", code="headers_too_large")


def unavailable(message: str, code: str, retry_after_s: int = 2) -> ApiError:
    """Return the error of a server that does not serve now."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after_s)})


def api_error(error: BaseException) -> ApiError:
    """Return the answer to an exception. Only errors of specache show their message."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return busy(str(error), error.retry_after_s)
    if isinstance(error, ServiceClosedError):
        return unavailable(str(error), "engine_stopped")
    if isinstance(error, OutOfMemoryError):
        return unavailable(str(error), "out_of_memory")
    if isinstance(error, FastMemoryError):
        return ApiError(400, str(error), code="exceeds_fast_memory")
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), code="invalid_grammar")
    if isinstance(error, UsageError | ConfigError | PromptError | UnsupportedModelError):
        return ApiError(400, str(error))
    if isinstance(error, SpeCacheError):
        return ApiError(500, str(error), code="generation_failed")
    return ApiError(500, "The server failed at this request. Its log says why.", code="internal_error")


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an `ApiError` or an error of specache (FastAPI's exception handler)."""
    return error_response(api_error(error), RequestContext.of(request.scope))


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer what the router raises: 404, 405."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    message = error.detail if error.detail != HTTPStatus(status).phrase else ""
    if status == 404:
        message = "There is no such address. GET /v1/models lists the model, docs/server.md the addresses."
    elif status == 405:
        message = f"This address does not take {request.method[:16]}."
    answer = ApiError(status, message or str(error.detail), code=_CODES.get(status), headers=error.headers)
    return error_response(answer, RequestContext.of(request.scope))
