"""Convert settings of tasks and methods, which are dataclass fields, from and to text and JSON."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from specache.errors import ConfigError

_LARGEST = 2**63 - 1  # int64, which PyTorch's sizes have
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

_Built = TypeVar("_Built")


def field_types(cls: type) -> dict[str, Any]:
    """Return the settable fields of a dataclass and their types."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def is_tuple(kind: Any) -> bool:
    """Return whether a type is `tuple[X, ...]`, optionally or `None`."""
    return any(get_origin(one) is tuple for one in _alternatives(kind))


def parse(text: str, kind: Any, name: str) -> Any:
    """Parse a value of type `kind` as a user writes it.

    Examples: `true`, `none`, `0.5`, a member of an enum, `1,2,3` for a tuple. Where both int and
    float are allowed, whole numbers above 1 are ints (bytes), others floats (fractions).

    Raises:
        ConfigError: the text has another type. The message begins with `name` and says what is
            expected.
    """
    kinds = _alternatives(kind)
    if type(None) in kinds and text.strip().lower() == "none":
        return None
    kinds = [one for one in kinds if one is not type(None)]
    if float in kinds and int in kinds:
        number = _parse_one(text, float, name)
        return int(number) if number > 1 and number.is_integer() else number
    for one in kinds[:-1]:
        try:
            return _parse_one(text, one, name)
        except ConfigError:
            continue
    return _parse_one(text, kinds[-1], name)


def from_json(cls: type[_Built], values: dict[str, Any]) -> _Built:
    """Make a dataclass from the JSON of its `settings()`. Keys that are no field are ignored.

    Raises:
        ConfigError: a value does not fit, or a field without default is missing.
    """
    kinds = field_types(cls)
    try:
        return cls(**{name: _restored(value, kinds[name]) for name, value in values.items() if name in kinds})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot make {cls.__name__} from the settings {values}: {error}") from error


def flag(name: str) -> str:
    """Return a field's name as written on a command line."""
    return name.replace("_", "-")


def shown(value: Any) -> str:
    """Format a value for a label."""
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _alternatives(kind: Any) -> list[Any]:
    if get_origin(kind) in (Union, types.UnionType):
        return list(get_args(kind))
    return [kind]


def _parse_one(text: str, kind: Any, name: str) -> Any:
    text = text.strip()
    if get_origin(kind) is tuple:
        parts = [part for part in text.split(",") if part.strip()]
        return tuple(_parse_one(part, get_args(kind)[0], name) for part in parts)
    if get_origin(kind) is Literal:
        return _chosen(text, {str(value): value for value in get_args(kind)}, name)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _chosen(text, {str(member.value): member for member in kind}, name)
    if kind is bool:
        return _boolean(text, name)
    if kind in (int, float):
        return _number(text, kind, name)
    return Path(text).expanduser() if kind is Path else text


def _chosen(text: str, members: dict[str, Any], name: str) -> Any:
    if text not in members:
        raise ConfigError(f"{name} must be one of {_join(members)}, got {text!r}.")
    return members[text]


def _boolean(text: str, name: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ConfigError(f"{name} must be true or false, got {text!r}.")
    return text.lower() in _TRUE


def _number(text: str, kind: type, name: str) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not isinstance(number, int) and not math.isfinite(number):
        raise ConfigError(f"{name} must be {'a whole number' if kind is int else 'a number'}, got {text!r}.")
    if kind is int and number > _LARGEST:
        raise ConfigError(f"{name} must be at most {_LARGEST:,}, got {text}.")
    return number


def _restored(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        inner = next((get_args(one)[0] for one in _alternatives(kind) if get_origin(one) is tuple), Any)
        return tuple(_restored(one, inner) for one in value)
    kinds = _alternatives(kind)
    if isinstance(value, str) and str not in kinds:
        return parse(value, kind, "a setting")
    return value


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)
