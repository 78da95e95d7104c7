"""The body of `/v1/messages` and of `/v1/messages/count_tokens`.

What has no effect on an answer of this server is accepted. What would change the answer and is not
served is refused by its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from specache.server.anthropic_blocks import Blocks, Texts, ToolName, ToolReferenceBlock, ToolResultBlock, ToolUseBlock, check_role
from specache.server.chat_fields import LONGEST_CHAT
from specache.server.json_body import FIRST_ERROR, FieldError, JsonBody
from specache.server.sampling_fields import check_stops
from specache.server.tool_fields import MOST_TOOLS


class MessageFields(JsonBody):
    """One message.

    A message of the role `system` after the first one of the user is a note to the model at that
    place; with `clear_at` it is gone once the user has written again.
    """

    role: Literal["user", "assistant", "system"]
    content: Blocks
    clear_at: Literal["next_user_message", "never"] | None = None
    output_config: Any = None

    @field_validator("output_config")
    @classmethod
    def _check_output(cls, value: Any) -> Any:
        if value:
            raise ValueError("settings of a single message are not served. Use output_config of the request")
        return value

    @model_validator(mode="after")
    def _check_message(self) -> MessageFields:
        check_role(self.role, self.content)
        if self.clear_at is not None and self.role != "system":
            raise FieldError("clear_at", "only messages of the role system have it")
        return self


def _check_tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise ValueError(
            f"tools of the type {kind[:40]!r} run at Anthropic or are known to its models alone. "
            "Describe a tool of your own: name, description, input_schema"
        )
    return value


class ToolFields(JsonBody):
    """A tool that the model may call: `input_schema` is the JSON schema of its input.

    One with `defer_loading` is shown to the model once a result of another tool refers to it.
    """

    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    cache_control: Any = None  # from here on: accepted, without effect
    eager_input_streaming: bool | None = None
    allowed_callers: Annotated[list[str], FIRST_ERROR] | None = None
    input_examples: list[Any] | None = None


class ToolChoiceFields(JsonBody):
    """Whether tools are called: as the model likes, at least one, the one named, or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoiceFields:
        if (self.name is None) == (self.type == "tool"):
            raise FieldError("name", "a choice of the type tool needs it, and no other has it")
        return self


class ThinkingFields(JsonBody):
    """Whether the model reasons first, and whether the answer shows it."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(None, ge=1, lt=2**31)
    display: Literal["summarized", "omitted", "updates"] | None = None
    block_binding: Any = None

    @model_validator(mode="after")
    def _check_budget(self) -> ThinkingFields:
        if (self.budget_tokens is None) == (self.type == "enabled"):
            raise FieldError("budget_tokens", "thinking of the type enabled needs it, and no other has it")
        return self

    @property
    def is_on(self) -> bool:
        """Return whether the model may reason."""
        return self.type != "disabled"


class JsonFormat(JsonBody):
    """The JSON schema that an answer has."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(JsonBody):
    """How much a model reasons, and the form of its answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class ThinkingTurns(JsonBody):
    """The number of newest answers whose reasoning stays in the prompt."""

    type: Literal["thinking_turns"]
    value: int = Field(ge=1, lt=2**31)


def _check_edit(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "clear_thinking_20251015":
        raise ValueError(f"edits of the type {kind[:40]!r} are not served. Leave it out, and shorten messages yourself")
    return value


class ClearThinking(JsonBody):
    """Leaves the reasoning of older answers out of the prompt."""

    type: Literal["clear_thinking_20251015"]
    keep: ThinkingTurns | Literal["all"] = ThinkingTurns(type="thinking_turns", value=1)

    @field_validator("keep", mode="before")
    @classmethod
    def _read_all(cls, value: Any) -> Any:
        return "all" if value == {"type": "all"} else value


class ContextManagement(JsonBody):
    """Edits of the conversation before the model reads it."""

    edits: list[Annotated[ClearThinking, BeforeValidator(_check_edit)]] | None = Field(None, max_length=8)


class CountBody(JsonBody):
    """A conversation whose tokens are counted, with all that a request for an answer may have.

    Ours: `seed`, `min_p`, `repetition_penalty`, `policy`, `top_k_pairs`, `session` and
    `chat_template_kwargs`, as in OpenAI's API.
    """

    messages: Annotated[list[MessageFields], Field(min_length=1, max_length=LONGEST_CHAT), FIRST_ERROR]
    model: str | None = Field(None, max_length=512)
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    system: Texts | None = None
    tools: list[Annotated[ToolFields, BeforeValidator(_check_tool)]] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: ToolChoiceFields | None = None
    thinking: ThinkingFields | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    context_management: ContextManagement | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    policy: str | None = None
    top_k_pairs: int | None = None
    session: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mcp_servers: Any = None  # from here on: refused unless empty
    container: Any = None
    thread: Any = None
    compaction: Any = None
    metadata: dict[str, Any] | None = None  # from here on: accepted, without effect
    cache_control: Any = None
    service_tier: str | None = None
    speed: str | None = None
    inference_geo: str | None = None
    diagnostics: Any = None
    billing_policy: Any = None
    fallbacks: Any = None
    fallback_credit_token: Any = None

    @field_validator("mcp_servers", "container", "thread", "compaction")
    @classmethod
    def _check_absent(cls, value: Any) -> Any:
        if value:
            raise ValueError("it is not served. Leave it out")
        return value

    @field_validator("stop_sequences", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        return check_stops(value)

    @model_validator(mode="after")
    def _check_results(self) -> CountBody:
        calls: set[str] = set()
        for number, message in enumerate(self.messages):
            for index, block in enumerate(message.content):
                if isinstance(block, ToolUseBlock):
                    calls.add(block.id)
                elif isinstance(block, ToolResultBlock) and block.tool_use_id not in calls:
                    field = f"messages[{number}].content[{index}].tool_use_id"
                    raise FieldError(field, "no message before it has a call with this id")
        return self

    @model_validator(mode="after")
    def _check_choice(self) -> CountBody:
        names = [tool.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise FieldError("tools", "two of them have the same name")
        choice = self.tool_choice
        if choice is not None and choice.type in ("any", "tool") and not names:
            raise FieldError("tool_choice", "there are no tools")
        if choice is not None and choice.type == "tool" and choice.name not in names:
            raise FieldError("tool_choice.name", "there is no such tool")
        shown = [tool.name for tool in self.shown_tools]
        if choice is not None and ((choice.type == "any" and not shown) or (choice.type == "tool" and choice.name not in shown)):
            raise FieldError("tool_choice", "with defer_loading a tool can be called once a tool_reference in a result names it")
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise FieldError("output_format", "it is the old name of output_config.format. Give one of them")
        return self

    @property
    def shown_tools(self) -> list[ToolFields]:
        """Return the tools that the model is told about."""
        results = [block for message in self.messages for block in message.content if isinstance(block, ToolResultBlock)]
        found = {one.tool_name for result in results for one in result.content or () if isinstance(one, ToolReferenceBlock)}
        return [tool for tool in self.tools or () if not tool.defer_loading or tool.name in found]

    @property
    def shows_thinking(self) -> bool:
        """Return whether the answer has the text of the reasoning."""
        return self.thinking is None or self.thinking.display != "omitted"

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """Return the JSON schema that the answer must have, or `None`."""
        format = self.output_format or (None if self.output_config is None else self.output_config.format)
        return None if format is None else format.json_schema


class MessagesBody(CountBody):
    """A request for an answer. With `max_tokens: 0` its prompt is read and kept, no more."""

    max_tokens: int = Field(ge=0, lt=2**31)

    @model_validator(mode="after")
    def _check_last(self) -> MessagesBody:
        if self.messages[-1].role == "assistant":
            raise FieldError("messages", "the last one must be the user's: a message of the assistant is not continued")
        return self
