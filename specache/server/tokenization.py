"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as other local servers have them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, field_validator, model_validator

from specache.server.app_state import state_of
from specache.server.chat_fields import LONGEST_CHAT, ChatMessage, check_results, check_variables
from specache.server.error_responses import ApiError
from specache.server.json_body import FIRST_ERROR, FieldError, JsonBody, read_body
from specache.server.request_context import RequestContext
from specache.server.served_model import ServedModel
from specache.server.tool_fields import MOST_TOOLS, ToolDefinition, check_tools
from specache.server.tool_use import ToolUse

router = APIRouter()
_OF_MESSAGES = ("tools", "chat_template_kwargs")  # without effect on a prompt
_OF_PROMPT = ("add_special_tokens",)  # a chat template writes its own


class TokenizeBody(JsonBody):
    """A text, or a conversation."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=LONGEST_CHAT), FIRST_ERROR] | None = None
    tools: list[ToolDefinition] | None = Field(None, max_length=MOST_TOOLS)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_variables(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return check_variables(value)

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        other, fields = ("messages", _OF_MESSAGES) if self.messages is None else ("prompt", _OF_PROMPT)
        for field in fields:
            if getattr(self, field):
                raise FieldError(field, f"it needs {other}. Leave it out")
        check_tools(self.tools, None)
        check_results(self.messages or [])
        return self


class DetokenizeBody(JsonBody):
    """Token ids."""

    model: str | None = Field(None, max_length=512)
    tokens: list[int]

    @field_validator("tokens", mode="plain")
    @classmethod
    def _check_tokens(cls, value: Any) -> list[int]:
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise ValueError("it must be a list of token ids")
        return value


@router.post("/tokenize")
async def tokenize(http: Request) -> dict[str, Any]:
    """Return the tokens of a text or of a conversation."""
    state = state_of(http)
    body = await read_body(http, state, TokenizeBody)
    served, _ = state.ready()
    state.open_stream(RequestContext.of(http.scope))
    served.check_name(body.model)
    tokens = await state.work(_tokens, served, body, state.settings.most_messages)
    strings = served.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": served.positions, "tokens": tokens, "token_strs": strings}


@router.post("/detokenize")
async def detokenize(http: Request) -> dict[str, Any]:
    """Return the text of tokens, special ones spelled out."""
    state = state_of(http)
    body = await read_body(http, state, DetokenizeBody)
    served, _ = state.ready()
    state.open_stream(RequestContext.of(http.scope))
    served.check_name(body.model)
    served.check_tokens(body.tokens, "tokens")
    return {"prompt": await state.work(served.decode, body.tokens)}


@router.get("/tokenizer_info")
async def tokenizer_info(http: Request) -> dict[str, Any]:
    """Return what clients that write prompts themselves need to know of the tokenizer."""
    served, _ = state_of(http).ready()
    tokenizer = served.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
    special = {name: getattr(tokenizer, name, None) for name in names}
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": served.vocabulary_size,
        "model_max_length": served.positions,
        "chat_template": tokenizer.chat_template,
        "additional_special_tokens": sorted(served.special_tokens.keys() - set(map(str, special.values()))),
        **{name: None if token is None else str(token) for name, token in special.items()},
        **{f"{name}_id": getattr(tokenizer, f"{name}_id", None) for name in names},
    }


def _tokens(served: ServedModel, body: TokenizeBody, most_messages: int) -> list[int]:
    if body.messages is None:
        return served.encode_text(body.prompt or "", special=body.add_special_tokens is not False)
    if len(body.messages) > most_messages:
        raise ApiError(400, f"A conversation may have {most_messages:,} messages.", param="messages")
    tools = ToolUse.of(body.tools, None, None)
    return served.encode_chat(body.messages, body.chat_template_kwargs or {}, tools)
