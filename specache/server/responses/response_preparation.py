"""From the body of a request to a job: history, messages, prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specache.server.app_state import AppState
from specache.server.chat_fields import ChatBody
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

_READ_AGAIN = 4  # the bytes that references may stand for, in bodies
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


async def prepare_response(state: AppState, context: RequestContext, body: ResponsesBody) -> PreparedResponse:
    """Return the response to a request before its first token.

    Raises:
        ApiError, SpeCacheError: 400; 404, what it goes on from is not stored.
    """
    served, _ = state.ready()
    conversation = await state.work(_Conversation.read, state, context, body)
    prompts = _Prompts(JobMaker(served, state.settings, context.owner), conversation, state.settings.default_new_tokens)
    try:
        jobs = await state.make_jobs(prompts.jobs, conversation.chat)
    except ApiError as error:
        raise in_these_names(error) from None
    head = ResponseObject(body, served.names[0])
    stored = [item.to_json(item_id(item.prefix, head.hex, place)) for place, item in enumerate(conversation.own)]
    return PreparedResponse(body, head, jobs, stored, conversation.parent)


def count_prompt(state: AppState, context: RequestContext, body: ResponsesBody) -> int:
    """Return the tokens of a request's prompt, on a worker thread.

    Raises:
        ApiError, SpeCacheError: as `prepare_response`.
    """
    served, _ = state.ready()
    conversation = _Conversation.read(state, context, body)
    prompts = _Prompts(JobMaker(served, state.settings, context.owner), conversation, state.settings.default_new_tokens)
    try:
        return prompts.tokens(served.positions, state.settings.most_prompt_tokens)
    except ApiError as error:
        raise in_these_names(error) from None


@dataclass(frozen=True)
class _Conversation:
    """What a request says, with what it goes on from.

    Attributes:
        own: the items of the request itself.
        items: these and all before them.
        chat: the same as a chat request.
    """

    body: ResponsesBody
    parent: StoredTurn | None
    own: list[InputItem]
    items: list[InputItem]
    chat: ChatBody

    @classmethod
    def read(cls, state: AppState, context: RequestContext, body: ResponsesBody) -> _Conversation:
        """Return the conversation of a request. On a worker thread."""
        parent = _hold_parent(state, context, body)
        own = resolved(body.input, state.responses, context.owner, _READ_AGAIN * state.settings.most_body_bytes)
        items = [*_history(parent), *own]
        return cls(body, parent, own, items, chat_body(body, chat_messages(items, body.instructions)))


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

    def __init__(self, maker: JobMaker, conversation: _Conversation, default_new_tokens: int) -> None:
        self._maker = maker
        self._conversation = conversation
        limit = conversation.body.max_output_tokens
        self._wanted = default_new_tokens if limit is None else limit

    def jobs(self, chat: ChatBody) -> list[PreparedJob]:
        """Return the job of all items, or of those that fit if the request says so."""
        body, items = self._conversation.body, self._conversation.items
        if body.truncation != "auto":
            return self._maker.chat(chat)

        def whole(kept: list[InputItem]) -> list[PreparedJob]:
            return self._maker.chat(self._of(kept))

        def has_room(jobs: list[PreparedJob]) -> bool:
            return self._has_room(len(jobs[0].prompt_ids), jobs[0].served.positions)

        return PromptTruncation(whole, has_room).longest(items)

    def tokens(self, positions: int | None, most: int | None) -> int:
        """Return the tokens of the prompt of all items, or of those that fit.

        Args:
            most: the longest prompt that is read; `None` is the model's limit.
        """
        if self._conversation.body.truncation != "auto":
            return len(self._maker.chat_prompt(self._conversation.chat))

        def whole(kept: list[InputItem]) -> int:
            return len(self._maker.chat_prompt(self._of(kept)))

        def has_room(count: int) -> bool:
            return (most is None or count <= most) and self._has_room(count, positions)

        return PromptTruncation(whole, has_room).longest(self._conversation.items)

    def _of(self, kept: list[InputItem]) -> ChatBody:
        """Return the chat request with some of the items."""
        messages = chat_messages(kept, self._conversation.body.instructions)
        return self._conversation.chat.model_copy(update={"messages": messages})

    def _has_room(self, prompt_tokens: int, positions: int | None) -> bool:
        """Return whether there is room for the answer that was asked for, or for a usual one."""
        return positions is None or prompt_tokens + min(self._wanted, positions // _SHARE_OF_ANSWER) <= positions
