"""The response object of OpenAI's API, from its first event to its last."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from specache.server.error_responses import ApiError
from specache.server.responses.response_fields import AllowedTools, NamedTool, ResponsesBody

_ERROR_CODES = {429: "rate_limit_exceeded"}


class ResponseObject:
    """What a response says about itself, beside its output.

    Attributes:
        hex: what is random about its identifier; those of its items have it too.
        stored: whether it can be asked for later.
    """

    def __init__(self, body: ResponsesBody, model: str) -> None:
        self.hex = uuid4().hex
        self.stored = body.stores
        self._created = int(time.time())
        self._fields = {**_requested(body), "model": model}

    @property
    def response_id(self) -> str:
        """Return its identifier."""
        return f"resp_{self.hex}"

    def to_json(
        self,
        status: str,
        output: list[dict[str, Any]] | None = None,
        usage: dict[str, Any] | None = None,
        error: ApiError | None = None,
    ) -> dict[str, Any]:
        """Return the object at some time.

        Args:
            status: `in_progress`, `completed`, `failed`, or `incomplete` if it reached its limit.
        """
        code = None if error is None else _ERROR_CODES.get(error.status, "server_error")
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None if error is None else {"code": code, "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output or [],
            "usage": usage,
            "store": self.stored,
            **self._fields,
        }


def _requested(body: ResponsesBody) -> dict[str, Any]:
    """Return what the object repeats of its request, with the defaults."""
    reasoning, text = body.reasoning, body.text
    text_format = {"type": "text"} if text is None or text.format is None else text.format.to_json()
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": text_format, "verbosity": (text and text.verbosity) or "medium"},
        "tool_choice": _choice(body),
        "tools": [tool.to_json() for tool in body.tools or []],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }


def _choice(body: ResponsesBody) -> Any:
    choice = body.tool_choice
    if isinstance(choice, NamedTool | AllowedTools):
        return choice.model_dump()
    return choice or "auto"
