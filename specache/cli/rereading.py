"""Compare stored tokens with a new prompt, and explain to the user what is read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specache.cli.prompts import Message
from specache.templates.template import ChatTemplate, PromptError

if TYPE_CHECKING:
    from specache import SpeCache
    from specache.sessions.manifest import Rendering


@dataclass(frozen=True)
class StoredPrompt:
    """The content of a session when it was opened.

    Attributes:
        name: name of the session.
        token_ids: stored tokens.
        messages: the conversation that they render; empty for raw text.
        rendering: how it was rendered; None in older sessions.
    """

    name: str
    token_ids: list[int]
    messages: list[Message]
    rendering: Rendering | None

    def note(self, prompt: Sequence[int], messages: Sequence[Message], template: ChatTemplate) -> str | None:
        """Return a note if the prompt reuses few tokens, or None.

        Causes are a conversation that is rendered differently now, and another prompt or system
        message.

        Args:
            prompt: the new prompt's token ids.
            messages: the conversation that it renders; empty for raw text.
            template: the chat template, with its variables and date.
        """
        same = common_length(self.token_ids, prompt)
        if self._is_rendered_differently(template):
            why = self._difference(template)
        elif 2 * same < min(len(self.token_ids), len(prompt)):
            both_talk = messages and self.messages  # a raw text has no system message
            another_system = both_talk and self._has_another_system(messages)
            why = "the system message is another one" if another_system else "the prompt is another one"
        else:
            return None
        stored = len(self.token_ids)
        return f"session {self.name}: only {same:,} of its {stored:,} tokens begin this prompt, the rest is read again: {why}."

    def nothing_reused(self) -> str:
        """Return a note that no stored token was reused, for an unexplained case."""
        return f"session {self.name}: none of its {len(self.token_ids):,} tokens could be used, so the whole prompt was read."

    def _is_rendered_differently(self, template: ChatTemplate) -> bool:
        """Return True if the conversation up to its last question has other tokens now."""
        asked = list(self.messages)
        while asked and asked[-1]["role"] != "user":
            asked.pop()
        if not asked or not template.exists:
            return False
        try:
            ids = template.encode(asked)
        except PromptError:
            return True
        shorter = min(len(ids), len(self.token_ids))
        return ids[:shorter] != self.token_ids[:shorter]

    def _difference(self, template: ChatTemplate) -> str:
        if self.rendering is not None and self.rendering.template != template.digest:
            return "the model's chat template has changed since"
        if self.rendering is not None and self.rendering.variables != template.variables:
            return "--chat-template-kwargs are not those of the session"
        return "the chat template writes the conversation otherwise than it did"

    def _has_another_system(self, messages: Sequence[Message]) -> bool:
        return _system(messages) != _system(self.messages)


def note_on_stored(cache: SpeCache, prompt: list[int]) -> str | None:
    """Return a note if many of a cache's tokens do not match a prompt, or None."""
    from specache.engine.continuing import shared_with_loss

    same = shared_with_loss(cache, prompt)
    if same is None:
        return None
    return f"only {same:,} of {cache.get_seq_length():,} stored tokens begin this prompt, the rest is read again."


def _system(messages: Sequence[Message]) -> list[str]:
    return [one["content"] for one in messages if one["role"] == "system"]


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the number of leading tokens that both have."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
