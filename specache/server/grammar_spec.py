"""What the answer to a request must look like, before it is compiled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from specache.server.sampling_fields import SamplingFields

GrammarKind = Literal["json_schema", "json_object", "regex", "lark"]


@dataclass(frozen=True)
class GrammarSpec:
    """A grammar as text. Two that are equal compile to the same.

    Attributes:
        kind: how `text` is read.
        text: a JSON schema, a regular expression, or a Lark grammar, in which `<marker>` is a
            special token; empty for `json_object`.
        param: the field of the request that it came from, which errors name.
        after_reasoning: it describes the final message, and reasoning in front is free; if False,
            it describes the answer from its first token, reasoning and markers included.
    """

    kind: GrammarKind
    text: str = ""
    param: str = field(default="response_format", compare=False)
    after_reasoning: bool = field(default=True, compare=False)


def grammar_of(body: SamplingFields, tool_format: Any = None) -> GrammarSpec | None:
    """Return the grammar that the answer to a request must match; `None` if it is free.

    Args:
        tool_format: how the model writes calls of tools, if it can.
    """
    return body.grammar_spec
