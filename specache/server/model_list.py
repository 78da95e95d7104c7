"""`GET /v1/models`: the one model that is served."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request

from specache.server.app_state import state_of
from specache.server.dialects import Dialect
from specache.server.request_context import RequestContext
from specache.server.served_model import ServedModel

router = APIRouter()


@router.get("/v1/models")
async def list_models(http: Request) -> dict[str, Any]:
    """Return the model under each of its names."""
    served, _ = state_of(http).ready()
    cards = [_card(http, served, name) for name in served.names]
    if _is_anthropic(http):
        return {"data": cards, "has_more": False, "first_id": served.names[0], "last_id": served.names[-1]}
    return {"object": "list", "data": cards}


@router.get("/v1/models/{name:path}")
async def show_model(http: Request, name: str) -> dict[str, Any]:
    """Return the model, if this is its name."""
    served, _ = state_of(http).ready()
    served.check_name(name)
    return _card(http, served, name)


def _is_anthropic(http: Request) -> bool:
    return RequestContext.of(http.scope).dialect is Dialect.ANTHROPIC


def _card(http: Request, served: ServedModel, name: str) -> dict[str, Any]:
    if not _is_anthropic(http):
        return {"id": name, "object": "model", "created": served.created, "owned_by": "specache", "max_model_len": served.positions}
    created = datetime.fromtimestamp(served.created, UTC).isoformat().replace("+00:00", "Z")
    facts = {"display_name": name, "created_at": created, "lifecycle": "active"}
    return {"type": "model", "id": name, **facts, "max_input_tokens": served.positions, "max_tokens": served.positions}
