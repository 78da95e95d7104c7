"""What a request says about tools: which there are, and whether one must be called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from specache.server.tool_fields import AllowedTools, Choice, ToolChoice, ToolDefinition, ToolFunction, chosen_names


@dataclass(frozen=True, eq=False)
class ToolUse:
    """The tools of a request.

    Attributes:
        functions: the tools, in the order of the request.
        required: whether the answer must call a tool.
        only: names of the tools that may be called; `None` is any of them.
        allowed: whether a call in the answer is a call. If not, it is text (`tool_choice: "none"`).
        parallel: whether an answer may have several calls.
    """

    functions: tuple[ToolFunction, ...]
    required: bool = False
    only: frozenset[str] | None = None
    allowed: bool = True
    parallel: bool = True

    @classmethod
    def of(cls, tools: Sequence[ToolDefinition] | None, choice: Choice | None, parallel: bool | None) -> ToolUse | None:
        """Return what fields of a request say; `None` without tools."""
        if not tools:
            return None
        names = chosen_names(choice)
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedTools) else choice
        is_one = isinstance(choice, ToolChoice)
        return cls(
            tuple(tool.function for tool in tools),
            required=is_one or mode == "required",
            only=None if names is None else frozenset(names),
            allowed=mode != "none",
            parallel=parallel is not False and not is_one,
        )

    @cached_property
    def callable(self) -> tuple[ToolFunction, ...]:
        """Return the tools that the answer may call."""
        if not self.allowed:
            return ()
        return tuple(one for one in self.functions if self.only is None or one.name in self.only)

    @cached_property
    def names(self) -> frozenset[str]:
        """Return the names that a call may have."""
        return frozenset(one.name for one in self.callable)

    @property
    def has_strict(self) -> bool:
        """Return whether a call must match its schema, or the request is refused."""
        return any(one.strict for one in self.callable)

    def loosened(self) -> ToolUse:
        """Return the same tools, whose arguments may be any object unless they are strict."""
        loose = {"parameters": {"type": "object"}}
        return replace(self, functions=tuple(one if one.strict else one.model_copy(update=loose) for one in self.functions))

    def described(self) -> list[dict[str, Any]]:
        """Return the tools in OpenAI's form and the order of the request, for chat templates."""
        return [{"type": "function", "function": _described(one)} for one in self.functions]


def _described(function: ToolFunction) -> dict[str, Any]:
    """Return a tool with every field that templates read.

    Templates write `function.description`, which must be there.
    """
    parameters = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
    return {"name": function.name, "description": function.description or "", "parameters": parameters}
