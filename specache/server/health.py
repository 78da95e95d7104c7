"""`/health`, `/metrics` and `/v1/status`: how the server is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from specache.server.app_state import AppState, state_of
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
    """Return the engine's numbers, and of this key the newest requests and stored responses."""
    state, owner = state_of(http), RequestContext.of(http.scope).owner
    engine = {} if state.service is None else service_numbers(state.service.status())
    return {
        "status": _condition(state),
        "model": None if state.served is None else state.served.names[0],
        "open_requests": state.open_streams,
        **engine,
        "requests": state.recent.of(owner),
        "responses": state.responses.numbers(owner),
    }


def _condition(state: AppState) -> str:
    if state.closing:
        return "shutting_down"
    if state.service is None:
        return "loading"
    return "ok" if state.service.wait_until_ready(0) else "engine_stopped"
