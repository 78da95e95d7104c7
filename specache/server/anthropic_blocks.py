"""Content of Anthropic's messages: blocks of text, reasoning, calls of tools and their results.

Blocks that a model of text cannot read are refused by their type.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from specache.server.json_body import FIRST_ERROR, HIDDEN, FieldError, JsonBody, check_json
from specache.server.tool_fields import LONGEST_CALL_ID

TOOL_NAME = r"^[A-Za-z0-9_-]{1,128}$"
MOST_BLOCKS = 4096  # of one message
_MOST_VALUES = 50_000  # of the input of a call
_DEEPEST = 64

CallId = Annotated[str, Field(min_length=1, max_length=LONGEST_CALL_ID)]
ToolName = Annotated[str, Field(pattern=TOOL_NAME)]


class _Block(JsonBody):
    """`cache_control` has no effect: every prompt is kept for those that begin alike."""

    cache_control: Any = None


class TextBlock(_Block):
    """Text."""

    type: Literal["text"]
    text: str
    citations: Any = None  # of an earlier answer


class ThinkingBlock(_Block):
    """Reasoning of an earlier answer. Its signature is not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None

    @property
    def text(self) -> str:
        """Return the reasoning; that of an answer which did not show it is in its signature."""
        return self.thinking or hidden_reasoning(self.signature or "")


class RedactedThinkingBlock(_Block):
    """Reasoning of another model that nobody can read. It is left out."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(_Block):
    """A call of a tool in an earlier answer."""

    type: Literal["tool_use"]
    id: CallId
    name: ToolName
    input: dict[str, Any]
    caller: Any = None
    toolset_name: None = None

    @field_validator("input")
    @classmethod
    def _check_input(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_json(value, deepest=_DEEPEST, most_values=_MOST_VALUES)
        return value


def _as_blocks(value: Any) -> Any:
    """Return a text as a list of one block."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _check_citations(value: Any) -> Any:
    if isinstance(value, dict) and value.get("enabled"):
        raise ValueError("citations are not served. Leave them out")
    return value


def _check_kind(known: Sequence[str], value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise ValueError("it must be an object with a type, such as {'type': 'text', 'text': ...}")
    if kind not in known:
        raise ValueError(f"blocks of the type {kind[:40]!r} are not read here: this model takes {', '.join(known)}")
    return value


def _check_text(value: Any) -> Any:
    return _check_kind(("text",), value)


Citations = Annotated[Any, BeforeValidator(_check_citations)]
_BLOCKS = (Field(max_length=MOST_BLOCKS), FIRST_ERROR, BeforeValidator(_as_blocks))
Texts = Annotated[list[Annotated[TextBlock, BeforeValidator(_check_text)]], *_BLOCKS]


class DocumentSource(JsonBody):
    """The text of a document, as `data` or as `content`."""

    type: Literal["text", "content"]
    media_type: Literal["text/plain"] | None = None
    data: str | None = None
    content: Texts | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _check_type(cls, value: Any) -> Any:
        if value in ("base64", "url", "file"):
            raise ValueError(f"documents of the type {value!r} are not read here. Send their text: {{'type': 'text', ...}}")
        return value

    @property
    def text(self) -> str:
        """Return the whole text."""
        return joined([self.data, *(block.text for block in self.content or ())])


class DocumentBlock(_Block):
    """A document of plain text. The model reads its title, context and text."""

    type: Literal["document"]
    source: DocumentSource
    title: str | None = None
    context: str | None = None
    citations: Citations = None

    @property
    def text(self) -> str:
        """Return what the model reads."""
        return joined([self.title, self.context, self.source.text])


class SearchResultBlock(_Block):
    """Something that was found elsewhere. The model reads its title, source and text."""

    type: Literal["search_result"]
    source: str
    title: str
    content: Texts
    citations: Citations = None

    @property
    def text(self) -> str:
        """Return what the model reads."""
        return joined([self.title, self.source, *(block.text for block in self.content)])


class ToolReferenceBlock(_Block):
    """The name of a tool that was found: one with `defer_loading` can be called from here on."""

    type: Literal["tool_reference"]
    tool_name: ToolName

    @property
    def text(self) -> str:
        """Return what the model reads."""
        return f"The tool {self.tool_name} can be called now."


def _kind(value: Any) -> str:
    """Return the tag of a block, which is no part of its path."""
    return f"{HIDDEN}{value['type'] if isinstance(value, dict) else value.type}"


def _check_result(value: Any) -> Any:
    return _check_kind(("text", "document", "search_result", "tool_reference"), value)


def _check_block(value: Any) -> Any:
    kinds = ("text", "document", "search_result", "thinking", "redacted_thinking", "tool_use", "tool_result")
    return _check_kind(kinds, value)


_Text = Annotated[TextBlock, Tag(f"{HIDDEN}text")]
_Document = Annotated[DocumentBlock, Tag(f"{HIDDEN}document")]
_SearchResult = Annotated[SearchResultBlock, Tag(f"{HIDDEN}search_result")]
_ToolReference = Annotated[ToolReferenceBlock, Tag(f"{HIDDEN}tool_reference")]
ResultBlock = Annotated[_Text | _Document | _SearchResult | _ToolReference, Discriminator(_kind), BeforeValidator(_check_result)]


class ToolResultBlock(_Block):
    """The result of a call of a tool."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Annotated[list[ResultBlock], *_BLOCKS] | None = None
    is_error: bool | None = None
    toolset_name: None = None

    @property
    def text(self) -> str:
        """Return what the model reads: that of a failed call begins with `Error:`."""
        text = joined([block.text for block in self.content or ()])
        return f"Error: {text}".rstrip() if self.is_error else text


Block = Annotated[
    _Text
    | _Document
    | _SearchResult
    | Annotated[ThinkingBlock, Tag(f"{HIDDEN}thinking")]
    | Annotated[RedactedThinkingBlock, Tag(f"{HIDDEN}redacted_thinking")]
    | Annotated[ToolUseBlock, Tag(f"{HIDDEN}tool_use")]
    | Annotated[ToolResultBlock, Tag(f"{HIDDEN}tool_result")],
    Discriminator(_kind),
    BeforeValidator(_check_block),
]
Blocks = Annotated[list[Block], *_BLOCKS]


def joined(texts: Sequence[str | None]) -> str:
    """Return texts one below the other, without those that are missing."""
    return "\n".join(text for text in texts if text is not None)


_HIDING = "specache-hidden:"  # begins signatures that hold reasoning


def hiding_signature(reasoning: str) -> str:
    """Return a signature that holds reasoning which its block does not show.

    A client sends it back with the next request, so that the model still has it.
    """
    return _HIDING + base64.b64encode(reasoning.encode()).decode()


def hidden_reasoning(signature: str) -> str:
    """Return the reasoning in a signature; an empty text if there is none."""
    if not signature.startswith(_HIDING):
        return ""
    try:
        return base64.b64decode(signature.removeprefix(_HIDING), validate=True).decode()
    except ValueError:
        return ""


_OF_ROLE = {
    "user": ("text", "document", "search_result", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}


def check_role(role: str, blocks: Sequence[Any]) -> None:
    """Refuse blocks that a message of a role cannot have.

    Raises:
        FieldError: names the first one.
    """
    for index, block in enumerate(blocks):
        if block.type not in _OF_ROLE[role]:
            raise FieldError(f"content[{index}]", f"a message of the role {role} has no blocks of the type {block.type}")
