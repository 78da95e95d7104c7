"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from specache.engine.events import NewToken, TokenLogprob
from specache.server.token_bytes import TokenBytes

Scored = NewToken | TokenLogprob
LOWEST = -9999.0  # what a masked token has: JSON has no infinity


def chat_logprobs(tokens: Iterable[NewToken], token_bytes: TokenBytes) -> dict[str, Any]:
    """Return `choices[].logprobs` of a chat answer: one entry per token."""
    content = [
        {**_entry(token_bytes, token.token_id, token.logprob), "top_logprobs": [_entry(token_bytes, *top) for top in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(token_bytes: TokenBytes, token_id: int, logprob: float | None) -> dict[str, Any]:
    return {"token": token_bytes.text(token_id), "logprob": _finite(logprob), "bytes": list(token_bytes(token_id))}


class CompletionLogprobs:
    """Makes `choices[].logprobs` of a completion, piece by piece.

    Args:
        wanted: how many likely tokens to report beside each.
        special_ids: tokens that the text leaves out.
    """

    def __init__(self, token_bytes: TokenBytes, wanted: int, special_ids: frozenset[int]) -> None:
        self._bytes = token_bytes
        self._wanted = wanted
        self._special_ids = special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of the text in front of the next token

    def take(self, tokens: Iterable[Scored], *, with_special: bool = False, text: str = "") -> dict[str, Any]:
        """Return the fields of these tokens.

        Args:
            with_special: the text spells special tokens out, as that of a prompt of token ids.
            text: a prompt's text, which spells the special tokens that the tokenizer did not add,
                and lacks the space that many tokenizers put in front of it.
        """
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            name = self._bytes.text(token.token_id)
            found["tokens"].append(name)
            found["token_logprobs"].append(None if token.logprob is None else _finite(token.logprob))
            found["top_logprobs"].append(self._top(token))
            found["text_offset"].append(self._offset)
            if with_special or token.token_id not in self._special_ids or text.startswith(name, self._offset):
                written = self._decoder.decode(self._bytes(token.token_id))
                self._offset += len(written) - self._has_added_space(written, text)
        return found

    def _has_added_space(self, written: str, text: str) -> bool:
        """Return whether a token of a prompt begins with a space that the prompt has not."""
        if not written.startswith(" ") or text.startswith(written, self._offset):
            return False
        return len(written) > 1 and text.startswith(written[1:], self._offset)

    def _top(self, token: Scored) -> dict[str, float] | None:
        """Return the likeliest tokens and the token itself, by their text."""
        if token.logprob is None or not self._wanted:
            return None
        found: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            found.setdefault(self._bytes.text(token_id), _finite(logprob))
        return found


def _finite(logprob: float | None) -> float:
    return LOWEST if logprob is None else max(LOWEST, logprob)
