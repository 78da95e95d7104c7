"""A conversation that continues from its own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from specache.cli.answering import Outcome, answer
from specache.cli.models import LoadedModel
from specache.cli.prompts import Message, answered, system_message
from specache.cli.session_option import OpenedCache
from specache.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from specache import SpeCache


class ConversationFullError(UsageError):
    """The message and its answer fit only if the oldest turns are dropped."""


class Conversation:
    """The messages so far, and the cache that holds their keys and values.

    Each turn passes the token ids of the whole conversation; the library prefills only what the
    cache lacks. With a session, the conversation starts from its saved messages, and is saved
    before each answer and by `save`.

    Args:
        opened: the cache, closed with the conversation.
        options: arguments from `options.GenerationOptions.arguments`.
        stops: stop strings.
        system: the system message; None uses that of the session.

    Attributes:
        messages: the messages so far.
        unanswered: the session's last message if it has no answer; it is not in `messages`.

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
        """Answer a message.

        A partial answer, after an interrupt or an error, stays in the conversation.

        A message that was interrupted before its answer began is forgotten.

        Raises:
            ConversationFullError: there is no room for it unless older turns are dropped; it is
                forgotten.
            SpeCacheError: the message cannot be answered (too long, for example); it is forgotten.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        template = self._opened.template
        prompt = template.encode(asked)
        self._check_room(prompt, asked)
        self._opened.note_rereading(prompt, asked)
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
        self._opened.note_if_nothing_reused(outcome.reused_tokens)
        if not outcome.interrupted or outcome.results[0].token_ids:
            self.messages = answered(asked, outcome.results[0].text)
        return outcome

    @property
    def turns(self) -> int:
        """Return the number of turns: messages of the user, each with what follows it."""
        return len(_turns(self.messages))

    def drop(self, turns: int) -> int:
        """Forget the oldest turns, but not the system message.

        Returns:
            Tokens that are left. All but the system message is read again with the next message.
        """
        kept = [message for turn in _turns(self.messages)[turns:] for message in turn]
        messages = [*_beginning(self.messages), *kept]
        prompt = self._encoded(messages if kept else [*messages, {"role": "user", "content": "-"}]) if messages else []
        self.messages = messages
        self._opened.keep_beginning(prompt)
        return len(prompt) if kept else 0

    def turns_to_drop(self, text: str) -> int:
        """Return how many of the oldest turns to drop to leave half of the positions free.

        Return all of them if the message alone takes more than half.
        """
        message = {"role": "user", "content": text}
        turns = _turns(self.messages)
        for count in range(1, len(turns)):
            kept = [message for turn in turns[count:] for message in turn]
            if 2 * len(self._encoded([*_beginning(self.messages), *kept, message])) <= (self._loaded.max_positions or 0):
                return count
        return len(turns)

    def _encoded(self, messages: list[Message]) -> list[int]:
        return self._opened.template.encode(messages)

    def _check_room(self, prompt: list[int], asked: list[Message]) -> None:
        """Raise `ConversationFullError` if dropping turns would make room.

        `answer` handles a message that is too long.
        """
        positions = self._loaded.max_positions
        if positions is None or len(prompt) < positions or not self.turns:
            return
        if len(self._encoded([*_beginning(self.messages), asked[-1]])) < positions:
            raise ConversationFullError(
                f"The conversation is full: with this message it has {len(prompt):,} tokens, and the model has positions for "
                f"{positions:,}, the answer's among them. /drop forgets the oldest turns and goes on with the others, /reset "
                "forgets all of them; then send the message again."
            )

    def save(self) -> None:
        """Save the conversation, if there is a session.

        Raises:
            SpeCacheError: it cannot be saved. It stays in the conversation, and the next turn
                retries.
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
    """Return the session's messages, or the beginning of a new conversation."""
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


def _beginning(messages: list[Message]) -> list[Message]:
    """Return the messages before the user's first: the system message, or none."""
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), len(messages))
    return messages[:first]


def _turns(messages: list[Message]) -> list[list[Message]]:
    """Group messages into turns: a message of the user and what follows it."""
    turns: list[list[Message]] = []
    for message in messages[len(_beginning(messages)) :]:
        if message["role"] == "user":
            turns.append([])
        turns[-1].append(message)
    return turns
