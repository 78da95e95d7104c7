"""Fields of a request that say what its answer must look like.

OpenAI's is `response_format`. The others are those of vLLM (`structured_outputs`, `guided_*`) and
of llama.cpp (`json_schema`, `grammar`). Each becomes one `GrammarSpec`.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from specache.server.grammar_spec import GrammarSpec
from specache.server.json_body import FieldError, JsonBody

_MOST_CHOICES = 4096
Schema = dict[str, Any] | str


class NamedSchema(JsonBody):
    """`response_format.json_schema`. The schema holds whether `strict` or not."""

    name: str | None = Field(None, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(JsonBody):
    """`response_format`: text, any JSON object, or JSON of a schema.

    `schema` beside `json_object` is llama.cpp's way to give one.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _check_type(self) -> ResponseFormat:
        if (self.type == "json_schema") == (self.json_schema is None):
            raise ValueError("json_schema goes with type 'json_schema', and only with it")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("schema goes with type 'json_object' only; OpenAI's place for it is json_schema.schema")
        return self

    @property
    def spec(self) -> GrammarSpec | None:
        """Return the grammar; `None` for text."""
        if self.json_schema is not None:
            return _of_schema(self.json_schema.schema_, "response_format.json_schema.schema")
        if self.schema_ is not None:
            return _of_schema(self.schema_, "response_format.schema")
        return GrammarSpec("json_object", param="response_format") if self.type == "json_object" else None


class StructuredOutputs(JsonBody):
    """`structured_outputs` of vLLM: one of its fields."""

    json_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=_MOST_CHOICES)
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = None  # from here on: without effect
    disable_any_whitespace: bool | None = None

    @property
    def specs(self) -> list[GrammarSpec | None]:
        """Return the grammar of each field."""
        return [
            _of_schema(self.json_, "structured_outputs.json"),
            _of_text("regex", self.regex, "structured_outputs.regex"),
            _of_text("lark", self.grammar, "structured_outputs.grammar"),
            _of_choices(self.choice, "structured_outputs.choice"),
            GrammarSpec("json_object", param="structured_outputs.json_object") if self.json_object else None,
        ]


class GrammarFields(JsonBody):
    """The ways to ask for an answer of a certain form; a request may use one of them."""

    response_format: ResponseFormat | None = None
    regex: str | None = None
    grammar: str | None = None
    json_schema: Schema | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1, max_length=_MOST_CHOICES)
    guided_grammar: str | None = None

    @field_validator("response_format", mode="before")
    @classmethod
    def _check_format(cls, value: Any) -> Any:
        kinds = ("text", "json_object", "json_schema")
        if value is not None and (not isinstance(value, dict) or value.get("type") not in kinds):
            raise ValueError(f"its type must be one of {', '.join(kinds)}")
        return value

    @model_validator(mode="after")
    def _check_one(self) -> GrammarFields:
        specs = self._specs()
        if len(specs) > 1:
            first, second = (spec.param for spec in specs[:2])
            raise FieldError(second, f"{first} says already what the answer looks like. Leave one of them out")
        return self

    @property
    def grammar_spec(self) -> GrammarSpec | None:
        """Return the grammar that the request asks for; `None` for free text."""
        return next(iter(self._specs()), None)

    def _specs(self) -> list[GrammarSpec]:
        found = [
            None if self.response_format is None else self.response_format.spec,
            _of_schema(self.json_schema, "json_schema"),
            _of_schema(self.guided_json, "guided_json"),
            _of_text("regex", self.regex, "regex"),
            _of_text("regex", self.guided_regex, "guided_regex"),
            _of_text("lark", self.grammar, "grammar"),
            _of_text("lark", self.guided_grammar, "guided_grammar"),
            _of_choices(self.guided_choice, "guided_choice"),
            *([] if self.structured_outputs is None else self.structured_outputs.specs),
        ]
        return [spec for spec in found if spec is not None]


def _of_schema(schema: Schema | None, param: str) -> GrammarSpec | None:
    if schema is None:
        return None
    return GrammarSpec("json_schema", schema if isinstance(schema, str) else json.dumps(schema), param)


def _of_text(kind: Literal["regex", "lark"], text: str | None, param: str) -> GrammarSpec | None:
    return None if text is None else GrammarSpec(kind, text, param)


def _of_choices(choices: list[str] | None, param: str) -> GrammarSpec | None:
    """Return a grammar of several texts."""
    if choices is None:
        return None
    return GrammarSpec("lark", "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices), param)
