"""The items of stored responses: conversations to go on from, lists of them, references to one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pydantic_core

from specache.server.error_responses import ApiError
from specache.server.responses.input_items import InputItem, ItemReference, read_item
from specache.server.responses.response_store import ResponseStore, StoredTurn

_ITEM_ID = re.compile(r"[a-z]{2,3}_([0-9a-f]{32})[0-9a-f]{4,}")


def item_id(prefix: str, response_hex: str, place: int) -> str:
    """Return the identifier of an item. It names the response that it belongs to.

    Args:
        place: its place among the items of the response, those of its input first.
    """
    return f"{prefix}_{response_hex}{place:04x}"


def input_of(turn: StoredTurn) -> list[dict[str, Any]]:
    """Return the input items of one turn."""
    items: list[dict[str, Any]] = pydantic_core.from_json(turn.input_items)
    return items


def output_of(turn: StoredTurn) -> list[dict[str, Any]]:
    """Return the output items of one turn."""
    items: list[dict[str, Any]] = pydantic_core.from_json(turn.response)["output"]
    return items


def items_up_to(turn: StoredTurn, *, with_output: bool) -> list[dict[str, Any]]:
    """Return the items of a conversation, the oldest first.

    Args:
        with_output: whether the output of the turn itself is among them.
    """
    items: list[dict[str, Any]] = []
    for one in turn.conversation():
        items += input_of(one)
        if one is not turn or with_output:
            items += output_of(one)
    return items


def resolved(items: Sequence[InputItem], store: ResponseStore, owner: str) -> list[InputItem]:
    """Return items with what references stand for in their place.

    Raises:
        ApiError: 404, this key has no such item stored.
    """
    return [_find(item, place, store, owner) if isinstance(item, ItemReference) else item for place, item in enumerate(items)]


def _find(reference: ItemReference, place: int, store: ResponseStore, owner: str) -> InputItem:
    match = _ITEM_ID.fullmatch(reference.id)
    if match is not None:
        try:
            turn = store.find(owner, f"resp_{match[1]}")
        except ApiError:  # said below, with the name of the item
            turn = None
        found = None if turn is None else next((one for one in input_of(turn) + output_of(turn) if one["id"] == reference.id), None)
        if found is not None:
            return read_item(found)
    raise ApiError(
        404,
        f"input[{place}]: the item {reference.id[:80]!r} is not stored for this key. Send the item itself.",
        code="item_not_found",
        param=f"input[{place}].id",
    )
