"""How many patterns of a JSON schema may hold for one text at the same time.

llguidance intersects them. Time and memory for that double with each, and nothing ends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

MOST_AT_ONCE = 8
_DATA = frozenset(("enum", "const", "default", "examples", "required", "$defs", "definitions"))  # reached by `$ref`, or no schemas
_ANNOTATIONS = _DATA - {"enum", "const", "required"} | {"title", "description", "deprecated", "$schema", "$comment", "$id"}
_TOGETHER = ("anyOf", "oneOf")  # one of the options each, together with all else


def check_intersections(schema: dict[str, Any]) -> None:
    """Refuse a schema that intersects too many patterns.

    Raises:
        ValueError: says so, or that its references are chained too deeply.
    """
    patterns = _Patterns(schema)
    try:
        most = patterns.most(schema)
    except RecursionError:
        raise ValueError("$ref: its references are chained too deeply") from None
    if patterns.is_endless and any(map(_intersects, _all(schema))):
        most = sum(map(_own, _all(schema)))  # a loop may collect every one of them
    if most > MOST_AT_ONCE:
        raise ValueError(
            f"up to {most:,} of its patterns and formats hold for one text at the same time; {MOST_AT_ONCE} are served"
        )


class _Patterns:
    """Counts, at most, how many patterns hold for one text.

    Attributes:
        is_endless: a reference leads to itself, or is not found; the count may be too low.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self.is_endless = False
        self._root = root
        self._known: dict[int, int] = {}  # by identity of the object
        self._open: set[int] = set()

    def most(self, schema: Any) -> int:
        """Return the count for a schema, or for the worst one of a list."""
        if isinstance(schema, list):
            return max((self.most(one) for one in schema), default=0)
        if not isinstance(schema, dict):
            return 0
        if id(schema) in self._open:
            self.is_endless = True
            return 0
        if id(schema) not in self._known:
            self._open.add(id(schema))
            self._known[id(schema)] = self._count(schema)
            self._open.remove(id(schema))
        return self._known[id(schema)]

    def _count(self, schema: dict[str, Any]) -> int:
        together, inside = _own(schema), 0
        for key, value in schema.items():
            if key == "allOf" and isinstance(value, list):
                together += sum(map(self.most, value))
            elif key == "patternProperties" and isinstance(value, dict):
                together += sum(map(self.most, value.values()))
            elif key == "$ref" and isinstance(value, str):
                together += self.most(self._target(value))
            elif key in _TOGETHER:
                together += self.most(value)
            elif key == "properties" and isinstance(value, dict):
                inside = max(inside, self.most(list(value.values())))
            elif key not in _DATA:
                inside = max(inside, self.most(value))
        return together + inside

    def _target(self, reference: str) -> Any:
        found: Any = self._root
        for name in reference.removeprefix("#").split("/")[1:]:
            name = unquote(name).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isascii() and name.isdecimal() and int(name[:9]) < len(found):
                found = found[int(name[:9])]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                self.is_endless = True
                return None
        self.is_endless |= not reference.startswith("#/") and reference != "#"  # by a name, which is not looked up
        return found


def _own(schema: dict[str, Any]) -> int:
    return sum(isinstance(schema.get(key), str) for key in ("pattern", "format"))


def _intersects(schema: dict[str, Any]) -> bool:
    """Return whether an object of a schema may bring together patterns of several others."""
    parts = schema.get("allOf", ())
    several = len(schema.keys() - _ANNOTATIONS) > 1 or (isinstance(parts, list) and len(parts) > 1)
    return "patternProperties" in schema or (several and ("allOf" in schema or "$ref" in schema))


def _all(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every object, whose nesting is bounded."""
    level = [schema]
    while level:
        yield from (one for one in level if isinstance(one, dict))
        level = [
            inner for one in level for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
