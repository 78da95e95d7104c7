"""Fields of a request about tools, in OpenAI's form for chats."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from specache.server.json_body import JsonBody

MOST_TOOLS = 256
LONGEST_CALL_ID = 256  # characters
_NAME = r"^[A-Za-z0-9_.:/-]{1,128}$"


class ToolFunction(JsonBody):
    """What a tool is called, does, and takes: `parameters` is the JSON schema of its arguments."""

    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(JsonBody):
    """A tool that the model may call."""

    type: Literal["function"]
    function: ToolFunction


class ToolCallFunction(JsonBody):
    """The name and the arguments, as JSON text, of a call."""

    name: str = Field(pattern=_NAME)
    arguments: str


class ToolCallFields(JsonBody):
    """A call of a tool in an earlier answer."""

    id: str = Field(max_length=LONGEST_CALL_ID)
    type: Literal["function"] = "function"
    function: ToolCallFunction


class ChosenFunction(JsonBody):
    """The name of a tool."""

    name: str = Field(pattern=_NAME)


class ToolChoice(JsonBody):
    """The one tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction
