"""The model that is served: its names, its tokenizer's facts, and prompts as token ids."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from specache.errors import ConfigError
from specache.server.answer_parser import AnswerParser, ChatContext
from specache.server.chat_fields import ChatMessage
from specache.server.chat_prompt import ChatPrompt, characters
from specache.server.error_responses import ApiError
from specache.server.grammar_compiler import GrammarCompiler
from specache.server.token_bytes import TokenBytes
from specache.server.tool_formats.base import ToolFormat
from specache.server.tool_use import ToolUse
from specache.templates.end_tokens import end_texts, end_tokens
from specache.templates.template import ChatTemplate, PromptError


@dataclass(frozen=True)
class ServedModel:
    """A loaded model and what requests need to know about it. Every method may run in any thread.

    Attributes:
        model, tokenizer: of transformers.
        names: the names that requests may use; answers carry the one used, or the first.
        positions: the longest text that it can read, in tokens; `None` is unlimited.
        fingerprint: what answers depend on, for `system_fingerprint`.
    """

    model: Any
    tokenizer: Any
    names: tuple[str, ...]
    positions: int | None
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    making: threading.Lock = field(default_factory=threading.Lock, repr=False)  # transformers prepares one request at a time

    def warm_up(self) -> None:
        """Compute what the first request would wait for.

        The tokenizer's first call also leaves truncation and padding off, which its files may turn
        on: no two threads may change that at once.
        """
        self.encode_text("a")
        facts = ("token_bytes", "grammars", "vocabulary_size", "longest_token", "text_end_ids", "chat_end_ids", "pad_id")
        for fact in facts:
            getattr(self, fact)
        if self.template.exists:
            self.template.prepare()
            _ = self.chat_prompt

    @cached_property
    def template(self) -> ChatTemplate:
        """Return the chat template, without variables."""
        return ChatTemplate(self.tokenizer)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Return what compiles the grammars of requests."""
        return GrammarCompiler(self.tokenizer, self.vocabulary_size)

    @cached_property
    def vocabulary_size(self) -> int:
        """Return the number of tokens that the model has embeddings for."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @cached_property
    def longest_token(self) -> int:
        """Return the characters of the longest token, a bound for texts that may fit."""
        return max((len(token) for token in self.tokenizer.get_vocab()), default=1)

    @cached_property
    def text_end_ids(self) -> list[int]:
        """Return the tokens that end the continuation of a raw text."""
        return end_tokens(self.model.generation_config, self.tokenizer)

    @cached_property
    def chat_end_ids(self) -> list[int]:
        """Return the tokens that end an answer of a conversation."""
        return end_tokens(self.model.generation_config, self.tokenizer, self.template)

    @cached_property
    def end_texts(self) -> tuple[str, ...]:
        """Return the texts that end an answer, beside those of the request."""
        return tuple(end_texts(self.model.generation_config))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Return the special tokens, text -> id. The text of an answer leaves them out.

        Most have no name in the tokenizer (`eos_token`), such as `<|eom_id|>` of Llama 3.
        """
        return self.template.tokens.special

    @cached_property
    def pad_id(self) -> int:
        candidates = (self.model.generation_config.pad_token_id, self.tokenizer.pad_token_id, *self.text_end_ids, 0)
        return int(next(candidate for candidate in candidates if candidate is not None))

    def check_name(self, name: str | None) -> None:
        """Refuse the name of another model.

        Raises:
            ApiError: 404.
        """
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"The model {name[:80]!r} is not served here. This is {self.names[0]!r}.",
                code="model_not_found",
                param="model",
            )

    def encode_chat(self, messages: Sequence[ChatMessage], variables: dict[str, Any], tools: ToolUse | None = None) -> list[int]:
        """Return the token ids of a conversation up to where the answer begins.

        Special tokens that are spelled in a message, a call or a tool are text.

        Raises:
            ApiError, SpeCacheError: there is no chat template, or it rejects these messages.
        """
        if not self.template.exists:
            raise ApiError(
                400, "This model has no chat template. Use /v1/completions, with the whole prompt as a text.", param="messages"
            )
        self.check_characters(characters(messages, tools), "messages")
        try:
            prompt = self.chat_prompt
            template = self.template.with_variables({**variables, **prompt.variables(tools)}, datetime.now())
            return template.encode(prompt.messages(messages, tools))
        except ConfigError as error:  # a reserved variable
            raise ApiError(400, f"chat_template_kwargs: {error}", param="chat_template_kwargs") from error
        except PromptError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error

    def encode_text(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a raw text. Special tokens spelled in it are special tokens.

        Args:
            special: whether the tokenizer adds its own, such as a first one.
        """
        self.check_characters(len(text), "prompt")
        return [int(token) for token in self.tokenizer(text, add_special_tokens=special)["input_ids"]]

    def decode(self, token_ids: list[int], *, skip_special: bool = False) -> str:
        """Return the text of token ids."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special))

    def check_tokens(self, token_ids: list[int], param: str) -> None:
        """Refuse token ids that the model has no embeddings for.

        Raises:
            ApiError: 400.
        """
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocabulary_size:
            raise ApiError(
                400, f"{param}: token ids must be from 0 to {self.vocabulary_size - 1:,}.", param=param, code="invalid_value"
            )

    def check_characters(self, characters: int, param: str) -> None:
        """Refuse a text that cannot fit even if every token of it were the longest.

        Raises:
            ApiError: 400.
        """
        if self.positions is not None and characters > self.positions * self.longest_token:
            raise ApiError(
                400,
                f"The prompt is too long: {characters:,} characters are more than the model's {self.positions:,} tokens can be.",
                code="context_length_exceeded",
                param=param,
            )

    def new_answer(self, chat: ChatContext | None, stops: Sequence[str] = (), before: Sequence[int] = ()) -> AnswerParser:
        """Return an empty answer to a conversation, or (`None`) to a raw text.

        Args:
            before: the tokens of that text.
        """
        return AnswerParser(self.tokenizer, stops, chat, before)

    @cached_property
    def chat_prompt(self) -> ChatPrompt:
        """Return what writes conversations for the chat template."""
        return ChatPrompt(self.template)

    @property
    def tool_format(self) -> ToolFormat:
        """Return how the model is told about tools, and how it calls them."""
        return self.chat_prompt.tool_format
