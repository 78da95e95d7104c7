"""The body of `/v1/completions`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from specache.server.json_body import FieldError
from specache.server.sampling_fields import MOST_TOP_LOGPROBS, SamplingFields

DEFAULT_NEW_TOKENS = 16  # OpenAI's
Prompt = str | list[int]


class CompletionBody(SamplingFields):
    """A request to continue texts, as they are or as token ids."""

    prompt: list[Prompt]
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: Any = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _read_prompts(cls, value: Any) -> list[Prompt]:
        return read_prompts(value)

    @field_validator("suffix")
    @classmethod
    def _check_suffix(cls, value: Any) -> Any:
        if value not in (None, ""):
            raise ValueError("this model continues texts and does not fill gaps. Leave it out")
        return value

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.answers:
            raise FieldError("best_of", "it must equal n, since every answer is returned")
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", "0 needs echo: true")
        return self

    @property
    def wanted_tokens(self) -> int:
        """Return the number of tokens to generate: at least one, which `max_tokens: 0` drops."""
        return DEFAULT_NEW_TOKENS if self.max_tokens is None else max(1, self.max_tokens)


def read_prompts(value: Any) -> list[Prompt]:
    """Return the prompts: a text, token ids, or a list of either.

    Raises:
        ValueError: says what is wrong.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("it must be a text, a list of token ids, or a list of these")
    if _are_tokens(value):
        return [value]
    if all(isinstance(one, str) for one in value):
        return value
    for index, one in enumerate(value):
        if not isinstance(one, str) and not (isinstance(one, list) and _are_tokens(one)):
            raise ValueError(f"prompt {index} is neither a text nor a list of token ids")
        if one == []:
            raise ValueError(f"prompt {index} is empty")
    return value


def _are_tokens(value: list[Any]) -> bool:
    return all(type(one) is int for one in value)
