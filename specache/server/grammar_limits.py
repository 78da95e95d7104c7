"""How large a grammar may be: its text before it is compiled, then the work that it makes.

Compiling a text within these bounds takes under a second at worst, without the interpreter's lock
(Lark and regular expressions some milliseconds).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from specache.server.error_responses import ApiError
from specache.server.grammar_spec import GrammarSpec
from specache.server.schema_intersections import MOST_AT_ONCE, check_intersections

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MOST_BYTES = {"json_schema": 64 * 1024, "json_object": 0, "regex": 4 * 1024, "lark": 48 * 1024}
DEEPEST_SCHEMA = 64
MOST_PROPERTIES = 1000  # of one object; what they cost grows with the square
MOST_PATTERN_PROPERTIES = 64  # of the whole schema
MOST_MULTIPLE = 5000  # sum of `multipleOf` of integers: each is an automaton of that size
MOST_REPEATS = 10_000  # of a part of a regular expression, nested counts multiplied
_JSON_RULE = re.compile(r"%json\s*")
# Comments, texts and regular expressions of Lark; those without an end are refused by the compiler.
_QUOTED = re.compile(r'(?:#|//)[^\n]*|"(?:\\.|[^"\\\n])*+"?|/(?:\\[\s\S]|[^/\\])++/?')
_COUNT = re.compile(r"\{(\d+)?(?:,(\d+)?)?\}")


def parser_limits() -> LLParserLimits:
    """Return what compiling, and each step, may cost."""
    from llguidance import LLParserLimits

    return LLParserLimits(initial_lexer_fuel=200_000, max_lexer_states=10_000, verbose_errors=False)


def check_grammar_text(spec: GrammarSpec) -> None:
    """Refuse a grammar that is too large to be compiled.

    Raises:
        ApiError: 400, says what is too large.
    """
    try:
        _check_bytes(spec)
        if spec.kind == "regex":
            check_repeats(spec.text)
        elif spec.kind == "lark":
            _check_lark(spec.text)
        elif spec.kind == "json_schema":
            _check_schema(spec.text)
    except ValueError as error:
        raise refused(spec, str(error)) from None


def refused(spec: GrammarSpec, reason: str) -> ApiError:
    """Return the error of a grammar that is not served."""
    return ApiError(400, f"{spec.param}: {reason}.", param=spec.param, code="invalid_grammar")


def check_repeats(regex: str) -> None:
    """Refuse a regular expression whose counts (`{2,5}`) ask for many copies of a part.

    Raises:
        ValueError: says so, or that a backslash stands at its end.
    """
    sizes = [0]  # of the open groups, outermost first: the most copies of any part inside
    last = at = 0  # of the part before `at`
    while at < len(regex):
        count = _COUNT.match(regex, at)
        if count is not None:
            last *= max(1, *(int(number[:9]) for number in count.groups(default="1") if number))
            at = count.end()
            if last > MOST_REPEATS:
                raise ValueError(f"its counts repeat a part {last:,} times; {MOST_REPEATS:,} are served")
        else:
            at, last = _after_part(regex, at, sizes)
        sizes[-1] = max(sizes[-1], last)
    if at > len(regex):
        raise ValueError("a regular expression ends with a backslash")


def _after_part(regex: str, at: int, sizes: list[int]) -> tuple[int, int]:
    """Return where the part at `at` ends, and the most copies of anything inside it."""
    character = regex[at]
    if character == "\\":
        return at + 2, 1
    if character == "[":
        return _after_class(regex, at), 1
    if character == "(":
        sizes.append(1)
    elif character == ")" and len(sizes) > 1:
        return at + 1, sizes.pop()
    return at + 1, 1


def _after_class(regex: str, at: int) -> int:
    at += 2 if regex[at + 1 : at + 2] in ("^", "]") else 1
    depth = 1
    while at < len(regex) and depth:
        if regex[at] == "\\":
            at += 1
        else:
            depth += {"[": 1, "]": -1}.get(regex[at], 0)
        at += 1
    return at


def _check_bytes(spec: GrammarSpec) -> None:
    size, most = len(spec.text.encode("utf-8", "surrogatepass")), MOST_BYTES[spec.kind]
    if not spec.text and spec.kind != "json_object":
        raise ValueError("it is empty. Leave it out")
    if size > most:
        raise ValueError(f"it has {size:,} bytes; this server compiles up to {most:,}")


def _check_lark(lark: str) -> None:
    numbers = (int(number[:9]) for count in _COUNT.finditer(lark) for number in count.groups() if number)
    if max(numbers, default=0) > MOST_REPEATS:
        raise ValueError(f"a count repeats a part more than {MOST_REPEATS:,} times")
    if _QUOTED.sub("", lark).count("&") > MOST_AT_ONCE:
        raise ValueError(f"it intersects (&) more than {MOST_AT_ONCE} times")
    for found in _JSON_RULE.finditer(lark):
        try:
            schema, _ = json.JSONDecoder().raw_decode(lark, found.end())
        except (ValueError, RecursionError):
            continue  # which the compiler refuses
        if isinstance(schema, dict):
            _check_parts(schema)


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    if "x-guidance" in schema:
        raise ValueError("x-guidance is not a keyword of JSON schemas. Leave it out")
    _check_parts(schema)


def _check_parts(schema: dict[str, Any]) -> None:
    """Refuse a schema one of whose parts makes too much work."""
    patterns, multiples = 0, 0
    for one in _objects(schema):
        properties, more = one.get("properties"), one.get("patternProperties")
        if isinstance(properties, dict) and len(properties) > MOST_PROPERTIES:
            raise ValueError(f"an object has {len(properties):,} properties; {MOST_PROPERTIES:,} are served")
        if isinstance(more, dict):
            patterns += len(more)
            for regex in more:
                check_repeats(regex)
        if isinstance(one.get("pattern"), str):
            check_repeats(one["pattern"])
        if isinstance(one.get("multipleOf"), int):
            multiples += abs(one["multipleOf"])
    if patterns > MOST_PATTERN_PROPERTIES:
        raise ValueError(f"it has {patterns:,} patternProperties; {MOST_PATTERN_PROPERTIES} are served")
    if multiples > MOST_MULTIPLE:
        raise ValueError(f"the sum of its multipleOf is {multiples:,}; up to {MOST_MULTIPLE:,} is served")
    check_intersections(schema)


def _objects(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every object of a schema, wherever it stands.

    Raises:
        ValueError: they are nested too deeply.
    """
    level: list[Any] = [schema]
    for _ in range(DEEPEST_SCHEMA):
        if not level:
            return
        yield from (one for one in level if isinstance(one, dict))
        level = [inner for one in level for inner in _inside(one)]
    if level:
        raise ValueError(f"it is nested deeper than {DEEPEST_SCHEMA}")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
