"""From the body of a request to a job, on a worker thread: history, messages, prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specache.server.app_state import AppState
from specache.server.error_responses import ApiError
from specache.server.generation import JobMaker, PreparedJob
from specache.server.request_context import RequestContext
from specache.server.responses.chat_translation import chat_body, chat_messages, in_these_names
from specache.server.responses.input_items import InputItem, read_item
from specache.server.responses.prompt_truncation import PromptTruncation
from specache.server.responses.response_fields import ResponsesBody
from specache.server.responses.response_object import ResponseObject
from specache.server.responses.response_store import StoredTurn, missing_response
from specache.server.responses.stored_items import item_id, items_up_to, resolved

_SHARE_OF_ANSWER = 4  # truncation leaves a quarter of the model's positions to a long answer


@dataclass(frozen=True)
class PreparedResponse:
    """A response that can be generated.

    Attributes:
        head: what its object says beside the output.
        jobs: the one job of it.
        input_items: its own input, as it is stored.
        parent: the response that it goes on from.
    """

    body: ResponsesBody
    head: ResponseObject
    jobs: list[PreparedJob]
    input_items: list[dict[str, Any]]
    parent: StoredTurn | None

    def new_item_id(self, prefix: str, place: int) -> str:
        """Return the identifier of an item of the output."""
        return item_id(prefix, self.head.hex, len(self.input_items) + place)


def prepare_response(state: AppState, context: RequestContext, body: ResponsesBody) -> PreparedResponse:
    """Return the response to a request before its first token.

    Raises:
        ApiError, SpeCacheError: 400; 404, what it goes on from is not stored.
    """
    served, _ = state.ready()
    parent = _hold_parent(state, context, body)
    items = resolved(body.input, state.responses, context.owner)
    prompts = _Prompts(JobMaker(served, state.settings, context.owner), body, state.settings.default_new_tokens)
    try:
        jobs = prompts.jobs([*_history(parent), *items])
    except ApiError as error:
        raise in_these_names(error) from None
    head = ResponseObject(body, served.names[0])
    stored = [item.to_json(item_id(item.prefix, head.hex, place)) for place, item in enumerate(items)]
    return PreparedResponse(body, head, jobs, stored, parent)


def _hold_parent(state: AppState, context: RequestContext, body: ResponsesBody) -> StoredTurn | None:
    """Return the response that the request goes on from, which stays until the request ends."""
    if body.previous_response_id is None:
        return None
    try:
        parent = state.responses.hold(context.owner, body.previous_response_id)
    except ApiError:
        raise missing_response(body.previous_response_id, "previous_response_id", "previous_response_not_found") from None
    context.at_end(lambda: state.responses.release(parent))
    return parent


def _history(parent: StoredTurn | None) -> list[InputItem]:
    return [] if parent is None else [read_item(item) for item in items_up_to(parent, with_output=True)]


class _Prompts:
    """Makes the job of a conversation."""

    def __init__(self, maker: JobMaker, body: ResponsesBody, default_new_tokens: int) -> None:
        self._maker = maker
        self._body = body
        self._wanted = default_new_tokens if body.max_output_tokens is None else body.max_output_tokens

    def jobs(self, items: list[InputItem]) -> list[PreparedJob]:
        """Return the job of all items, or of those that fit if the request says so."""
        if self._body.truncation == "auto":
            return PromptTruncation(self._whole, self._has_room).longest(items)
        return self._whole(items)

    def _whole(self, items: list[InputItem]) -> list[PreparedJob]:
        return self._maker.chat(chat_body(self._body, chat_messages(items, self._body.instructions)))

    def _has_room(self, jobs: list[PreparedJob]) -> bool:
        """Return whether there is room for the answer that was asked for, or for a usual one."""
        job = jobs[0]
        positions = job.served.positions
        return positions is None or len(job.prompt_ids) + min(self._wanted, positions // _SHARE_OF_ANSWER) <= positions
