"""A conversation that continues from its own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from specache.cli.answering import Outcome, answer
from specache.cli.models import LoadedModel
from specache.cli.prompts import Message, answered, system_message
from specache.cli.session_option import OpenedCache
from specache.errors import ConfigError

if TYPE_CHECKING:
    from specache import SpeCache


class Conversation:
    """Messages so far, and the cache that holds their keys and values.

    Each turn hands over the token ids of the whole conversation; the library prefills only what the cache lacks. With a session the
    conversation begins with what it was saved with, and is saved before each answer and by `save`.

    Args:
        opened: the cache, which is closed with the conversation.
        options: from `options.GenerationOptions.arguments`.
        stops: texts to stop before.
        system: the system message; `None` takes that of the session.

    Attributes:
        messages: what was said.
        unanswered: the session's last message, where there is no answer to it; it is not among `messages`.

    Raises:
        ConfigError: the session holds no conversation, or one with another system message.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        opened: OpenedCache,
        options: dict[str, Any],
        *,
        stops: Sequence[str] = (),
        system: str | None = None,
    ) -> None:
        self._loaded = loaded
        self._opened = opened
        self._options = options
        self._stops = stops
        self.messages = _continued(opened, system)
        self.unanswered = self.messages.pop()["content"] if self.messages and self.messages[-1]["role"] == "user" else None

    @property
    def cache(self) -> SpeCache:
        return self._opened.cache

    def say(
        self, text: str, on_text: Callable[[int, str], None], on_reasoning: Callable[[int, str], None] | None = None
    ) -> Outcome:
        """Answer a message. An answer that an interrupt or an error ended stays in the conversation as far as it came.

        Raises:
            SpeCacheError: the message cannot be answered (too long, for example); it is then forgotten.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        template = self._opened.template
        prompt = template.encode(asked)
        self._opened.say_what_is_read_again(prompt, asked)
        outcome = answer(
            self._loaded,
            [prompt],
            self.cache,
            self._options,
            stops=self._stops,
            template=template,
            on_text=on_text,
            on_reasoning=on_reasoning,
            on_prefilled=lambda: self._opened.save(asked),
            description="Reading",
        )
        self._opened.say_if_nothing_was_reused(outcome.reused_tokens)
        self.messages = answered(asked, outcome.results[0].text)
        return outcome

    def save(self) -> None:
        """Save what was said, if there is a session.

        Raises:
            SpeCacheError: it cannot be saved. It stays in the conversation, and the next turn tries again.
        """
        self._opened.save(self.messages)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._opened.clear()

    def close(self) -> None:
        """Free the cache."""
        self._opened.close()


def _continued(opened: OpenedCache, system: str | None) -> list[Message]:
    """The session's messages, or the beginning of a conversation."""
    earlier = opened.messages
    if not earlier:
        if opened.cache.get_seq_length():
            raise ConfigError(
                "The session holds a text and no conversation ('specache generate --raw' made it, or a program). Continue it with "
                "'specache generate --raw', or choose another name."
            )
        return system_message(system)
    if system is not None and earlier[: len(system_message(system))] != system_message(system):
        raise ConfigError("The session's conversation began with another system message. Leave out --system, or take another name.")
    return list(earlier)
