"""Apply a model's chat template: conversations in, token ids out."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any

from specache.errors import ConfigError, SpeCacheError
from specache.templates.dates import fixed_date
from specache.templates.markers import ControlTokens, HiddenMarkers, control_tokens, template_text
from specache.templates.split_encoding import Pieces, SplitEncoder, split_encoder

Message = dict[str, Any]  # as chat templates take it: `role`, `content`, and perhaps `tool_calls` and others

_OURS = {  # arguments of `apply_chat_template` that are not for users
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    "sanitize_control_tokens",
}


class PromptError(SpeCacheError):
    """A prompt that is missing, empty or unreadable, or that the chat template rejects."""


class ChatTemplate:
    """A model's chat template with the variables and date of one conversation.

    Markers in a message's text, in calls of tools and in variables (`tools` is one) are text and
    become no control tokens. Ordinary text gets the same tokens as from `apply_chat_template`.

    Args:
        tokenizer: the model's tokenizer; it may have no template.
        variables: template variables (`{"enable_thinking": False}`), as `apply_chat_template` takes
            them.
        date: the date that the template sees as today; by default today.
        system: the system message of `ask`.

    Raises:
        ConfigError: a variable has a reserved name.
    """

    def __init__(
        self,
        tokenizer: Any,
        variables: Mapping[str, Any] | None = None,
        *,
        date: datetime | None = None,
        system: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        self.date = date or datetime.now()
        self.system = system
        taken = sorted(_OURS & set(self.variables))
        if taken:
            raise ConfigError(f"A chat template variable cannot be called {taken[0]!r}: specache sets that itself.")

    def with_variables(self, variables: Mapping[str, Any] | None, date: datetime | None = None) -> ChatTemplate:
        """Return this template for another conversation. What `prepare` computed is shared."""
        other = ChatTemplate(self.tokenizer, variables, date=date, system=self.system)
        shared = {name: value for name, value in vars(self).items() if name in ("tokens", "_split_encoder")}
        other.__dict__.update(shared)
        return other

    def prepare(self) -> None:
        """Compute what the first conversation would wait for: seconds for large vocabularies."""
        with suppress(Exception):  # an unusual kind of tokenizer; `encode` does without
            _ = self._split_encoder

    @property
    def exists(self) -> bool:
        """Return True if the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def digest(self) -> str:
        """Return a fingerprint of the template's text."""
        return hashlib.sha256(template_text(self.tokenizer).encode()).hexdigest()

    @property
    def unknown_variables(self) -> list[str]:
        """Return the variables that the template does not mention."""
        text = template_text(self.tokenizer)
        return [name for name in self.variables if re.search(rf"\b{re.escape(name)}\b", text) is None]

    @cached_property
    def tokens(self) -> ControlTokens:
        """Return the control tokens of the tokenizer and the template."""
        return control_tokens(self.tokenizer)

    def ask(self, text: str) -> list[Message]:
        """Return a conversation of one question."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": text}]

    def render(self, messages: Sequence[Message], *, answer_begins: bool = True) -> str:
        """Return a conversation as text, by default up to where the model's answer begins.

        Markers in messages are not distinguished from control tokens.

        Raises:
            ConfigError: there is no chat template.
            PromptError: it rejects these messages.
        """
        return self._render(messages, self.variables, answer_begins)

    def encode(self, messages: Sequence[Message], *, answer_prefix: str = "", cut: str | None = None) -> list[int]:
        """Return the token ids of a conversation up to where the model's answer begins.

        Args:
            answer_prefix: the beginning of the answer, to be continued.
            cut: a text that occurs once in the messages; it and what follows is omitted.

        Raises:
            ConfigError: there is no chat template.
            PromptError: it rejects these messages.
        """
        hidden = HiddenMarkers()
        inside = self._changed(messages, hidden.hide)
        variables = _map_texts(self.variables, lambda text: hidden.hide(text, self.tokens.all))
        prefix = hidden.hide(answer_prefix, self.tokens.special)
        text = self.render(messages) + answer_prefix
        if not hidden:
            return self._tokenize(_before(text, cut))
        guarded = _before(self._render(inside, variables, True) + prefix, cut)
        if not hidden.is_whole(guarded):
            return self._without_markers(messages, answer_prefix, cut, guarded)
        pieces = [(hidden.reveal(piece), token) for piece, token in self._pieces(guarded)]
        text = _before(text, cut)
        if [token for _, token in self.tokens.found_in(text)] == [token for _, token in pieces[:-1]]:
            return self._tokenize(text)  # only the beginning of a marker, or one that the template dropped
        ids = self._split_encode(guarded, pieces)
        return ids if ids is not None else self._without_markers(messages, answer_prefix, cut, guarded)

    def _render(self, messages: Sequence[Message], variables: Mapping[str, Any], answer_begins: bool) -> str:
        if not self.exists:
            raise ConfigError("this model has no chat template. Use --raw, and 'specache generate'.")
        options: dict[str, Any] = {"add_generation_prompt": answer_begins, "tokenize": False}
        try:
            with fixed_date(self.date if "strftime_now" in template_text(self.tokenizer) else None):
                return str(self.tokenizer.apply_chat_template(list(messages), **options, **variables))
        except Exception as error:  # templates are programs and raise anything, for example about system messages
            raise PromptError(f"the model's chat template rejects the conversation: {error}") from error

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _changed(self, messages: Sequence[Message], change: Callable[[str, Mapping[str, int]], str]) -> list[Message]:
        """Return messages with every text in them changed.

        Args:
            change: maps a text, and the markers that are text in it.
        """

        def changed(message: Message, name: str, value: Any) -> Any:
            if name == "role":
                return value
            markers = self._forbidden(message["role"]) if name == "content" else self.tokens.all
            return _map_texts(value, lambda text: change(text, markers))

        return [{name: changed(one, name, value) for name, value in one.items()} for one in messages]

    def _forbidden(self, role: str) -> Mapping[str, int]:
        """Return the markers that are text in the content of a message of this role.

        A model's own answer may contain its `<think>` and `<tool_call>`.
        """
        return self.tokens.special if role == "assistant" else self.tokens.all

    def _pieces(self, guarded: str) -> Pieces:
        """Split a text into pieces, each with the control token after it; the last has none."""
        pieces: Pieces = []
        start = 0
        for place, token in self.tokens.found_in(guarded):
            pieces.append((guarded[start:place], token))
            start = place + len(token)
        return [*pieces, (guarded[start:], None)]

    def _split_encode(self, guarded: str, pieces: Pieces) -> list[int] | None:
        """Return token ids with control tokens only after the pieces.

        Return None if this tokenizer cannot do it.

        Args:
            guarded: the text with placeholders; the encoder must encode it like the tokenizer.
            pieces: the text with the markers that the placeholders replaced.
        """
        try:
            if self._split_encoder.encode(self._pieces(guarded)) != self._tokenize(guarded):
                return None
            ids = self._split_encoder.encode(pieces)
        except Exception:  # an unusual kind of tokenizer
            return None
        return ids if self._control_ids(ids) == self._wanted_ids(pieces) else None

    @cached_property
    def _split_encoder(self) -> SplitEncoder:
        return split_encoder(self.tokenizer, self.tokens)

    def _without_markers(self, messages: Sequence[Message], answer_prefix: str, cut: str | None, guarded: str) -> list[int]:
        """Return token ids with the markers in messages respelled, and warn about it."""

        def spell(text: str, markers: Mapping[str, int]) -> str:
            for marker in sorted(markers, key=len, reverse=True):
                text = text.replace(marker, "\N{ZERO WIDTH SPACE}".join(marker))
            return text

        changed = self._changed(messages, spell)
        variables = _map_texts(self.variables, lambda text: spell(text, self.tokens.all))
        text = _before(self._render(changed, variables, True) + spell(answer_prefix, self.tokens.special), cut)
        ids = self._tokenize(text)
        if self._control_ids(ids) != self._wanted_ids(self._pieces(guarded)):
            raise PromptError(
                "the conversation holds markers of the model's chat template, and they cannot be told from the template's own. "
                f"Remove them: {', '.join(self._markers_in(messages))}."
            )
        warnings.warn(
            f"The special tokens in the text ({', '.join(self._markers_in(messages))}) are spelled with invisible spaces for this "
            "model: its tokenizer cannot read them as text.",
            stacklevel=3,
        )
        return ids

    def _markers_in(self, messages: Sequence[Message]) -> list[str]:
        texts = list(_texts([*messages, self.variables]))
        return [marker for marker in self.tokens.all if any(marker in text for text in texts)]

    def _control_ids(self, ids: Sequence[int]) -> list[int]:
        """Return the control tokens among token ids, without the unknown token."""
        control = set(self.tokens.all.values()) - {getattr(self.tokenizer, "unk_token_id", None)}
        return [token_id for token_id in ids if token_id in control]

    def _wanted_ids(self, pieces: Pieces) -> list[int]:
        return self._control_ids([self.tokens.all[token] for _, token in pieces if token is not None])


def _before(text: str, cut: str | None) -> str:
    return text if cut is None else text.partition(cut)[0]


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with every text in it mapped.

    Keys of objects are mapped too, except words: templates look fields up by them.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key if key.isidentifier() else change(key): _map_texts(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_map_texts(each, change) for each in value]
    return value


def _texts(value: Any) -> Iterator[str]:
    """Yield every text of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield key
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
