"""How large a grammar may be: bytes first, then the work of compiling it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specache.server.error_responses import ApiError
from specache.server.grammar_spec import GrammarSpec

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MOST_BYTES = {"json_schema": 64 * 1024, "json_object": 0, "regex": 4 * 1024, "lark": 32 * 1024}


def check_grammar_text(spec: GrammarSpec) -> None:
    """Refuse a grammar that is too long to be compiled.

    Raises:
        ApiError: 400.
    """
    size, most = len(spec.text.encode("utf-8", "surrogatepass")), MOST_BYTES[spec.kind]
    if size > most:
        raise ApiError(
            400,
            f"{spec.param}: it has {size:,} bytes; this server compiles up to {most:,}.",
            param=spec.param,
            code="invalid_grammar",
        )


def parser_limits() -> LLParserLimits:
    """Return what compiling, and each step, may cost."""
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)
