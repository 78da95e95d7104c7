"""The items of a conversation: what `input` may hold, and what answers consist of.

An item has two forms: as clients send it, and as it is stored and listed (`to_json`), which is also
a form that clients may send.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PlainValidator, field_validator, model_validator

from specache.server.json_body import FieldError, JsonBody
from specache.server.tool_fields import LONGEST_CALL_ID, ToolCallFunction

LONGEST_ID = 256  # characters
_MOST_PARTS = 4096
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_REASONING = {"summary_text": "text", "reasoning_text": "text"}
Status = Literal["in_progress", "completed", "incomplete"]


class Part(NamedTuple):
    """A text of a message, or of the result of a call."""

    text: str
    is_refusal: bool = False


class InputItem(JsonBody):
    """One item. `null` is the same as a field that is left out."""

    id: str | None = Field(None, max_length=LONGEST_ID)
    status: Status | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        return {name: one for name, one in value.items() if one is not None}

    def to_json(self, item_id: str) -> dict[str, Any]:
        """Return the item as it is stored and listed.

        Args:
            item_id: its identifier, unless it came with one.
        """
        raise NotImplementedError

    @property
    def prefix(self) -> str:
        """Return how identifiers of such items begin."""
        raise NotImplementedError


class MessageItem(InputItem):
    """A message of a user, of the system or developer, or of an earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: list[Part]
    phase: str | None = None

    @field_validator("content", mode="plain")
    @classmethod
    def _read_content(cls, value: Any) -> list[Part]:
        return read_parts(value, _TEXTS)

    @property
    def text(self) -> str:
        """Return its text, however many parts it came in."""
        return _joined(self.content)

    @property
    def prefix(self) -> str:
        return "msg"

    def to_json(self, item_id: str) -> dict[str, Any]:
        content = [_message_part(self.role, part) for part in self.content]
        status = self.status or "completed"
        return {"type": "message", "id": self.id or item_id, "role": self.role, "status": status, "content": content}


class FunctionCallItem(InputItem, ToolCallFunction):
    """A call of a tool in an earlier answer."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=LONGEST_CALL_ID)
    parsed_arguments: Any = None  # what the client's `parse` adds
    caller: Any = None

    @property
    def prefix(self) -> str:
        return "fc"

    def to_json(self, item_id: str) -> dict[str, Any]:
        fields = {"id": self.id or item_id, "status": self.status or "completed"}
        return {"type": "function_call", **fields, "call_id": self.call_id, "name": self.name, "arguments": self.arguments}


class FunctionCallOutputItem(InputItem):
    """The result of a call of a tool."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=LONGEST_CALL_ID)
    output: str | list[Part]
    name: str | None = None  # from here on: accepted, without effect
    caller: Any = None

    @field_validator("output", mode="plain")
    @classmethod
    def _read_output(cls, value: Any) -> str | list[Part]:
        return value if isinstance(value, str) else read_parts(value, _TEXTS)

    @property
    def text(self) -> str:
        """Return the result as one text."""
        return self.output if isinstance(self.output, str) else _joined(self.output)

    @property
    def prefix(self) -> str:
        return "fco"

    def to_json(self, item_id: str) -> dict[str, Any]:
        output = self.output if isinstance(self.output, str) else [_message_part("user", part) for part in self.output]
        fields = {"id": self.id or item_id, "status": self.status or "completed"}
        return {"type": "function_call_output", **fields, "call_id": self.call_id, "output": output}


class ReasoningItem(InputItem):
    """The reasoning of an earlier answer.

    `encrypted_content` is that of other servers, and has no effect.
    """

    type: Literal["reasoning"]
    summary: list[Part] = Field(default_factory=list)
    content: list[Part] = Field(default_factory=list)
    encrypted_content: str | None = None

    @field_validator("summary", "content", mode="plain")
    @classmethod
    def _read_texts(cls, value: Any) -> list[Part]:
        return [] if value == [] else read_parts(value, _REASONING)

    @property
    def text(self) -> str:
        """Return the reasoning, or its summary if nothing else came."""
        return _joined(self.content or self.summary)

    @property
    def prefix(self) -> str:
        return "rs"

    def to_json(self, item_id: str) -> dict[str, Any]:
        summary = [{"type": "summary_text", "text": part.text} for part in self.summary]
        content = [{"type": "reasoning_text", "text": part.text} for part in self.content]
        fields = {"id": self.id or item_id, "status": self.status or "completed"}
        return {"type": "reasoning", **fields, "summary": summary, "content": content}


class ItemReference(InputItem):
    """An item of a stored response, by its identifier."""

    type: Literal["item_reference"] = "item_reference"
    id: str = Field(min_length=1, max_length=LONGEST_ID)


_KINDS: dict[str, type[InputItem]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": ItemReference,
}


def read_item(value: Any) -> InputItem:
    """Return an item of `input`.

    Raises:
        ValueError, ValidationError: says what is wrong with it.
    """
    if isinstance(value, InputItem):
        return value
    if not isinstance(value, dict):
        raise ValueError("it must be an object with a type, such as {'role': 'user', 'content': ...}")
    kind = value.get("type")
    if kind is None:
        kind = "item_reference" if "role" not in value and "id" in value else "message"
    if not isinstance(kind, str) or kind not in _KINDS:
        raise FieldError("type", f"items of the type {str(kind)[:40]!r} are not served. Use {', '.join(_KINDS)}")
    return _KINDS[kind].model_validate(value)


AnyItem = Annotated[InputItem, PlainValidator(read_item)]


def read_parts(value: Any, kinds: dict[str, str]) -> list[Part]:
    """Return the texts of a content, which may be one text or a list of parts.

    Args:
        kinds: the types that parts may have, and the field of each that holds its text.

    Raises:
        ValueError: names the part that is wrong.
    """
    if isinstance(value, str):
        return [Part(text=value)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"it must be a text, or a list of parts such as {{'type': {next(iter(kinds))!r}, 'text': ...}}")
    if len(value) > _MOST_PARTS:
        raise ValueError(f"it has more than {_MOST_PARTS:,} parts")
    return [_read_part(index, part, kinds) for index, part in enumerate(value)]


def _read_part(index: int, part: Any, kinds: dict[str, str]) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"part {index} must be an object with a type")
    if kind not in kinds:
        raise ValueError(
            f"part {index} has the type {kind[:40]!r}; this model reads text only, as {next(iter(kinds))!r}: no images or files"
        )
    text = part.get(kinds[kind])
    if not isinstance(text, str):
        raise ValueError(f"part {index} needs {kinds[kind]!r}, a text")
    return Part(text=text, is_refusal=kind == "refusal")


def _joined(parts: list[Part]) -> str:
    return "\n".join(part.text for part in parts)


def _message_part(role: str, part: Part) -> dict[str, Any]:
    if role == "assistant" and part.is_refusal:
        return {"type": "refusal", "refusal": part.text}
    if role == "assistant":
        return {"type": "output_text", "text": part.text, "annotations": []}
    return {"type": "input_text", "text": part.text}
