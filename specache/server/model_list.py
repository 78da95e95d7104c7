"""`GET /v1/models`: the one model that is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from specache.server.app_state import state_of
from specache.server.served_model import ServedModel

router = APIRouter()


@router.get("/v1/models")
async def list_models(http: Request) -> dict[str, Any]:
    """Return the model under each of its names."""
    served, _ = state_of(http).ready()
    return {"object": "list", "data": [_card(served, name) for name in served.names]}


@router.get("/v1/models/{name:path}")
async def show_model(http: Request, name: str) -> dict[str, Any]:
    """Return the model, if this is its name."""
    served, _ = state_of(http).ready()
    served.check_name(name)
    return _card(served, name)


def _card(served: ServedModel, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": served.created, "owned_by": "specache", "max_model_len": served.positions}
