"""Bodies: bounded JSON, checked field by field. What is wrong is said by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request

from specache.server.error_responses import ApiError

if TYPE_CHECKING:
    from specache.server.app_state import AppState

_Body = TypeVar("_Body", bound="JsonBody")
_SMALL = 32 * 1024  # bytes that are parsed faster than another thread takes them
_DEEPEST = 16  # of JSON without a schema
_MOST_VALUES = 2000
_MOST_FIELDS = 256  # of an object; each unknown one is an error of its own
FIRST_ERROR: Any = Field(fail_fast=True)  # ends a list at its first error: each takes a kilobyte, and a body may have millions
HIDDEN = "\0"  # begins tags of pydantic's unions, which are no names of fields


class JsonBody(BaseModel):
    """A JSON object whose fields are all known, with no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise ValueError(f"it has more than {_MOST_FIELDS} fields")
        return value


class FieldError(ValueError):
    """A field that does not go with others. Its name begins the message.

    Args:
        field: the name of the field.
        reason: what is wrong with it.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


async def read_body(http: Request, state: AppState, kind: type[_Body]) -> _Body:
    """Return the body of a request as the given kind of object.

    Raises:
        ApiError: 400, with the name of the field that is wrong.
    """
    try:
        data = await http.body()
    except ClientDisconnect:
        raise ApiError(499, "The client left.", code="client_disconnected") from None
    if len(data) <= _SMALL:
        return parse_body(data, kind)
    return await state.work(parse_body, data, kind)


def parse_body(data: bytes, kind: type[_Body]) -> _Body:
    """Parse and check a body.

    Raises:
        ApiError: 400.
    """
    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise invalid_body(error) from None


def invalid_body(error: ValidationError, rename: Callable[[str], str] | None = None) -> ApiError:
    """Return the answer to a body whose fields are wrong: it names the first one.

    Args:
        rename: returns what the request calls a field of the body.
    """
    found = error.errors(include_url=False, include_input=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    param = _path(first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        param = f"{param}.{cause.field}" if param else cause.field
    if rename is not None:
        param = rename(param)
    if isinstance(cause, FieldError):
        return ApiError(400, f"{param}: {cause.reason}.", param=param, code="invalid_value")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown field {param}. docs/server.md lists the fields.", param=param, code="unknown_field")
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    return ApiError(400, f"{param or 'The body'}: {message}.", param=param or None, code="invalid_value")


def _path(place: tuple[int | str, ...]) -> str:
    """Return `messages[0].content` for a place in the body. Names from the body are cut short."""
    parts = [part for part in place if not (isinstance(part, str) and part.startswith(HIDDEN))]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in parts)
    return "".join(character if character.isprintable() else "?" for character in text.removeprefix("."))


def check_json(value: Any, *, deepest: int = _DEEPEST, most_values: int = _MOST_VALUES) -> None:
    """Refuse JSON without a schema that is deep, long, or has a number that is none.

    Args:
        deepest, most_values: how many levels and values it may have.

    Raises:
        ValueError: says which.
    """
    level, count = [value], 0
    for _ in range(deepest):
        if not level:
            return
        count += len(level)
        if count > most_values:
            raise ValueError(f"it has more than {most_values:,} values")
        if any(isinstance(one, float) and one - one != 0 for one in level):
            raise ValueError("a number is too large")
        if any(isinstance(one, int) and abs(one) >= 2**63 for one in level):
            raise ValueError("a number is too large")
        level = [inner for one in level for inner in _inside(one)]
    raise ValueError(f"it is nested deeper than {deepest}")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
