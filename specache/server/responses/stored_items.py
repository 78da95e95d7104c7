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


def resolved(items: Sequence[InputItem], store: ResponseStore, owner: str, most_bytes: int) -> list[InputItem]:
    """Return items with what references stand for in their place.

    Args:
        most_bytes: the JSON that may be read for them, and that they may stand for. A short request
            could refer to a long item thousands of times.

    Raises:
        ApiError: 404, this key has no such item stored; 400, they are too long together.
    """
    references = _References(store, owner, most_bytes)
    return [references.find(item, place) if isinstance(item, ItemReference) else item for place, item in enumerate(items)]


class _References:
    """Finds the items of one request. Every response is read once."""

    def __init__(self, store: ResponseStore, owner: str, most_bytes: int) -> None:
        self._store = store
        self._owner = owner
        self._most_bytes = self._left_bytes = most_bytes
        self._of_response: dict[str, dict[str, dict[str, Any]]] = {}  # items as JSON, by their identifiers
        self._found: dict[str, tuple[InputItem, int]] = {}  # with the bytes of their JSON

    def find(self, reference: ItemReference, place: int) -> InputItem:
        """Return the item that a reference at a place of the input stands for."""
        name, param = reference.id, f"input[{place}]"
        if name not in self._found:
            match = _ITEM_ID.fullmatch(name)
            items = {} if match is None else self._items(f"resp_{match[1]}", param)
            if name not in items:
                message = f"{param}: the item {name[:80]!r} is not stored for this key. Send the item itself."
                raise ApiError(404, message, code="item_not_found", param=f"{param}.id")
            self._found[name] = read_item(items[name]), len(pydantic_core.to_json(items[name]))
        item, size = self._found[name]
        self._spend(size, param)
        return item

    def _items(self, response_id: str, param: str) -> dict[str, dict[str, Any]]:
        if response_id not in self._of_response:
            try:
                turn = self._store.find(self._owner, response_id)
            except ApiError:  # said by `find`, with the name of the item
                return {}
            self._spend(turn.size, param)
            newest_first = reversed(input_of(turn) + output_of(turn))
            self._of_response[response_id] = {one["id"]: one for one in newest_first}
        return self._of_response[response_id]

    def _spend(self, size: int, param: str) -> None:
        self._left_bytes -= size
        if self._left_bytes < 0:
            message = f"{param}: the items that the input refers to have more than {self._most_bytes:,} bytes. Send fewer of them."
            raise ApiError(400, message, code="invalid_value", param=f"{param}.id")
