"""Random JSON schemas whose answers are bounded, and what validates the answers."""

from __future__ import annotations

import json
import random
import string
from decimal import Decimal
from typing import Any

from jsonschema import Draft202012Validator

PATTERNS = ["^[a-f]{2,6}$", "^\\d{3}-\\d{2}$", "^(red|green|blue)!?$", "^[A-Z][a-z]{0,5}$", '^x?y{1,3}[^"\\\\\\s]$']
FORMATS = ["date", "ipv4", "uuid"]


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """Return a schema of an object."""
    kinds = [
        *2 * (_array, _tuple, _object, _any_of, _one_of, _reference),
        _string,
        _string,
        _integer,
        _number,
        _constant,
        _nullable,
    ]
    schema = _object_of(rng, {name: rng.choice(kinds)(rng, depth - 1) for name in _names(rng, 1, 4)})
    return {**schema, "$defs": {"shared": _any(rng, 1)}}


def check_answer(text: str, schema: dict[str, Any]) -> None:
    """Fail unless a text is JSON that the schema accepts.

    Numbers are decimal, since 0.3 is no multiple of 0.1 in binary.
    """
    decimal = json.loads(json.dumps(schema), parse_float=Decimal)
    Draft202012Validator(decimal, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(
        json.loads(text, parse_float=Decimal)
    )


def _names(rng: random.Random, least: int, most: int) -> list[str]:
    letters = string.ascii_lowercase + '_é" \\'
    return list({"".join(rng.choices(letters, k=rng.randint(1, 6))): None for _ in range(rng.randint(least, most))})


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth > 0 and rng.random() < 0.4:
        return rng.choice([_array, _object, _any_of])(rng, depth - 1)
    return rng.choice([_string, _integer, _number, _constant])(rng, depth)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.3:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind < 0.5:
        return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(-1000, 1000)
    bounds: dict[str, Any] = {"minimum": least, "maximum": least + rng.randint(20, 5000)}
    if rng.random() < 0.3:
        bounds = {"exclusiveMinimum": least, "exclusiveMaximum": least + rng.randint(30, 500)}
    if rng.random() < 0.3:
        bounds["multipleOf"] = rng.randint(2, 9)
    return {"type": "integer", **bounds}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(-50, 50)
    most = least + rng.randint(5, 100) + 0.5
    return {"type": "number", "minimum": least, "maximum": most, "multipleOf": rng.choice([0.25, 0.01, 0.5])}


def _constant(rng: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = [True, None, 7, -2.5, "no", "a\nb", [1, "x"], {"k": [None]}]
    return {"const": rng.choice(values)} if rng.random() < 0.3 else {"enum": rng.sample(values, rng.randint(1, 5))}


def _nullable(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": ["string", "null", "boolean"], "maxLength": rng.randint(1, 5)}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _tuple(rng: random.Random, depth: int) -> dict[str, Any]:
    first = [_any(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": rng.randint(0, len(first))}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    return _object_of(rng, {name: _any(rng, depth) for name in _names(rng, 0, 3)})


def _object_of(rng: random.Random, properties: dict[str, Any]) -> dict[str, Any]:
    required = [name for name in properties if rng.random() < 0.7]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if rng.random() < 0.2:
        schema |= {"patternProperties": {"^n[0-9]{1,2}$": {"type": "boolean"}}, "maxProperties": len(properties) + 2}
        schema["required"] = list(properties)
    return schema


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(2, 3))]}


def _one_of(rng: random.Random, depth: int) -> dict[str, Any]:
    options = []
    for kind in rng.sample(["cat", "dog", "fish"], 2):
        option = {"kind": {"const": kind}, kind: _any(rng, depth)}
        options.append({"type": "object", "properties": option, "required": ["kind", kind], "additionalProperties": False})
    return {"oneOf": options}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": "#/$defs/shared"}
