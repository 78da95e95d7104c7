"""`/health`, `/metrics` and `/v1/status`: how the server is."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from specache.server.app_state import AppState, state_of
from specache.server.error_responses import ApiError
from specache.server.request_context import RequestContext
from specache.server.service_numbers import service_numbers

router = APIRouter()


@router.api_route("/health", methods=["GET", "HEAD"])  # HEAD: load balancers ask so
async def health(http: Request) -> Response:
    """Say whether the server serves: 200, or 503 while it loads, ends or has failed."""
    condition = _condition(state_of(http))
    return JSONResponse({"status": condition}, 200 if condition == "ok" else 503)


@router.get("/metrics")
async def metrics(http: Request) -> Response:
    """Return the counters for Prometheus."""
    return Response(state_of(http).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/status")
async def status(http: Request) -> dict[str, Any]:
    """Return the engine's numbers; of this key running and newest requests, and stored responses.

    With `since`, in seconds since 1970, also the samples of memory that are newer.
    """
    state, owner = state_of(http), RequestContext.of(http.scope).owner
    since = _since(http.query_params.get("since"))
    engine = {} if state.service is None else service_numbers(state.service.status())
    return {
        "status": _condition(state),
        "model": None if state.served is None else state.served.names[0],
        "limits": _limits(state),
        "open_requests": state.open_streams,
        **engine,
        "running_requests": state.running.of(owner),
        "requests": state.recent.of(owner),
        "responses": state.responses.numbers(owner),
        **({} if since is None else {"memory": state.history.since(since)}),
    }


def _since(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ApiError(400, "since must be a number of seconds since 1970.", param="since", code="invalid_value")
    return seconds


def _limits(state: AppState) -> dict[str, int | None]:
    """Return what a client must keep to; `None` has no limit or is not known yet."""
    positions = None if state.served is None else state.served.positions
    limits = [limit for limit in (state.settings.most_prompt_tokens, positions) if limit is not None]
    return {
        "body_bytes": state.settings.most_body_bytes,
        "prompt_tokens": min(limits, default=None),
        "positions": positions,
        "default_new_tokens": state.settings.default_new_tokens,
    }


def _condition(state: AppState) -> str:
    if state.closing:
        return "shutting_down"
    if state.service is None:
        return "loading"
    return "ok" if state.service.wait_until_ready(0) else "engine_stopped"
