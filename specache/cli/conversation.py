"""A conversation that continues from its own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specache.cli.answering import Outcome, answer
from specache.cli.models import LoadedModel
from specache.cli.prompts import encode_chat, system_message
from specache.config import SpeCacheConfig


class Conversation:
    """Messages so far, and the cache that holds their keys and values.

    Each turn hands over the token ids of the whole conversation; the library prefills only what the cache lacks.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: SpeCacheConfig,
        options: dict[str, Any],
        *,
        stops: Sequence[str] = (),
        system: str | None = None,
    ) -> None:
        self._loaded = loaded
        self._config = config
        self._options = options
        self._stops = stops
        self._system = system
        self._open()

    def _open(self) -> None:
        from specache import SpeCache

        self.messages = system_message(self._system)
        self.cache = SpeCache(self._loaded.model, self._config)

    def say(self, text: str, on_text: Callable[[int, str], None]) -> Outcome:
        """Answer a message. An interrupted answer stays in the conversation as far as it came.

        Raises:
            SpeCacheError: the message cannot be answered (too long, for example); it is then forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = encode_chat(self._loaded.tokenizer, self.messages)
            outcome = answer(
                self._loaded,
                [ids],
                self.cache,
                self._options,
                stops=self._stops,
                on_text=on_text,
                description="Reading",
            )
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": outcome.results[0].text})
        return outcome

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.close()
        self._open()

    def close(self) -> None:
        """Free the cache."""
        self.cache.close()
