"""Fields of a request that choose its tokens, the same for every route that generates."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from specache.config import Policy
from specache.server.grammar_fields import GrammarFields
from specache.server.json_body import FieldError, JsonBody, check_json
from specache.server.tool_use import ToolUse

MOST_TOP_LOGPROBS = 20
_MOST_STOPS = 16
_LONGEST_STOP = 256  # characters
_MOST_BIASES = 1024
_COLDEST = 1e-4  # temperatures below are greedy: logits divided by less leave float32's range
_SESSION = re.compile(r"[A-Za-z0-9._-]{1,64}")

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(JsonBody):
    """`stream_options`: whether usage follows the last event.

    `include_obfuscation` has no effect.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def check_stops(value: Any) -> Any:
    """Return stop texts as a list.

    Raises:
        ValueError: they are no texts, too many, or too long.
    """
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("it must be a text, or a list of texts")
    if len(stops) > _MOST_STOPS or not all(0 < len(stop) <= _LONGEST_STOP for stop in stops):
        raise ValueError(f"it may have {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters")
    return stops


class SamplingFields(GrammarFields):
    """What OpenAI's two APIs for text have in common, and our own fields.

    `top_k`, `min_p`, `repetition_penalty`, `min_tokens` and `ignore_eos` are those of other local
    servers. Ours: `top_k_pairs` and `policy` (settings of the cache for this request), `session`.
    """

    model: str | None = Field(None, max_length=512)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: Probability | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, float] | None = None
    stop: list[str] | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    policy: Policy | None = None
    top_k_pairs: int | None = Field(None, ge=1, lt=2**31)
    session: str | None = None
    store: bool | None = None  # from here on: accepted, without effect
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        return check_stops(value)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_biases(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_BIASES:  # before each wrong one is an error
            raise ValueError(f"it may have {_MOST_BIASES:,} tokens")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 10 and token == str(int(token))):
                raise ValueError("its names must be token ids, such as 1734, without zeros in front")
            if not -100 <= bias <= 100:
                raise ValueError("a bias must be from -100 to 100")
        return value

    @field_validator("policy", mode="before")
    @classmethod
    def _read_policy(cls, value: Any) -> Any:
        names = [str(policy) for policy in Policy]
        if value is not None and value not in names:
            raise ValueError(f"it must be one of {', '.join(names)}")
        return None if value is None else Policy(value)

    @field_validator("session")
    @classmethod
    def _check_session(cls, value: str | None) -> str | None:
        if value is not None and not _SESSION.fullmatch(value):
            raise ValueError("it must have 1 to 64 letters, digits, '.', '_' or '-'")
        return value

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        check_json(value)
        return value

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "it needs stream: true")
        return self

    @model_validator(mode="after")
    def _check_end(self) -> SamplingFields:
        if self.ignore_eos and self.grammar_spec is not None:
            raise FieldError("ignore_eos", f"the answer ends where {self.grammar_spec.param} says. Leave one of them out")
        return self

    @property
    def tool_use(self) -> ToolUse | None:
        """Return the tools of the request; `None` if it has none."""
        return None

    @property
    def answers(self) -> int:
        """Return the number of answers to each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Return whether a stream ends with an event about usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def samples(self) -> bool:
        """Return whether tokens are drawn; else the likeliest one is taken."""
        return self.temperature is None or self.temperature >= _COLDEST

    def arguments(self) -> dict[str, Any]:
        """Return arguments of `specache.make_request`.

        All are explicit, since models ship sampling defaults. The defaults are OpenAI's.
        """
        arguments: dict[str, Any] = {
            "do_sample": self.samples,
            "num_beams": 1,
            "num_return_sequences": 1,  # a row for each of `n` answers is in the request already
            "repetition_penalty": self.repetition_penalty or 1.0,
            "min_new_tokens": self.min_tokens or None,
        }
        if self.samples:
            arguments["temperature"] = 1.0 if self.temperature is None else self.temperature
            arguments["top_p"] = 1.0 if self.top_p is None else self.top_p
            arguments["top_k"] = max(0, self.top_k or 0)
            arguments["min_p"] = self.min_p
        if self.logit_bias:
            arguments["sequence_bias"] = [[[int(token)], float(bias)] for token, bias in self.logit_bias.items()]
        return arguments
