"""The tool formats, and which one a model has."""

from __future__ import annotations

from typing import Any

from specache.server.tool_formats.base import ToolFormat
from specache.server.tool_formats.generic import GenericFormat
from specache.server.tool_formats.harmony import HarmonyFormat
from specache.server.tool_formats.hermes import HermesFormat
from specache.server.tool_formats.llama3 import Llama3Format
from specache.server.tool_formats.mistral import MistralFormat
from specache.templates.markers import template_text

FORMATS: tuple[type[ToolFormat], ...] = (HarmonyFormat, HermesFormat, MistralFormat, Llama3Format)


def tool_format(tokenizer: Any) -> ToolFormat:
    """Return the format of a model, by its chat template and tokens.

    It is the generic one if the template knows no tools, or writes calls in a form that is not
    known.
    """
    template = template_text(tokenizer)
    tokens = frozenset(str(token.content) for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
    found = (one.of(template, tokens) for one in FORMATS)
    return next((one for one in found if one is not None), GenericFormat(template))
