"""What is stored, compared with a new prompt: tokens that are read again are said, and why."""

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
    """What a session held when it was opened.

    Attributes:
        name: of the session.
        token_ids: whose keys and values it held.
        messages: the conversation that they are; none if they are a text.
        rendering: how that was written; `None` in sessions that do not say.
    """

    name: str
    token_ids: list[int]
    messages: list[Message]
    rendering: Rendering | None

    def note(self, prompt: Sequence[int], messages: Sequence[Message], template: ChatTemplate) -> str | None:
        """One line, if the session's conversation is written otherwise now, or if most of its tokens are none of the prompt's.

        Args:
            prompt: the new prompt's token ids.
            messages: the conversation that it is; none if it is a text.
            template: the chat template, with its variables and date.
        """
        same = common_length(self.token_ids, prompt)
        if self._is_written_otherwise(template):
            why = self._difference(template)
        elif 2 * same < min(len(self.token_ids), len(prompt)):
            why = "the system message is another one" if self._has_another_system(messages) else "the prompt is another one"
        else:
            return None
        stored = len(self.token_ids)
        return f"session {self.name}: only {same:,} of its {stored:,} tokens begin this prompt, the rest is read again: {why}."

    def nothing_reused(self) -> str:
        """One line for a prompt of which nothing was there, although no difference explains it."""
        return f"session {self.name}: none of its {len(self.token_ids):,} tokens could be used, so the whole prompt was read."

    def _is_written_otherwise(self, template: ChatTemplate) -> bool:
        """Whether the conversation up to its last question has other tokens now than the session holds."""
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
    """One line, if much of what a cache holds is of no use for a prompt."""
    from specache.engine.continuing import shared_with_loss

    same = shared_with_loss(cache, prompt)
    if same is None:
        return None
    return f"only {same:,} of {cache.get_seq_length():,} stored tokens begin this prompt, the rest is read again."


def _system(messages: Sequence[Message]) -> list[str]:
    return [one["content"] for one in messages if one["role"] == "system"]


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """The number of leading tokens that both have."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
