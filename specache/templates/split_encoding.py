"""Tokenising a text in which some markers are control tokens and others, spelled the same, are text.

Tokenizers can do one or the other with a whole text. A copy of the tokenizer does both: it knows each control token under a private
name, which stands in the text where the token is meant, and the marker itself means nothing to it. All else is the tokenizer's own
work on the text as a whole, so words merge at the seams as ever.
"""

from __future__ import annotations

import copy
import json
import secrets
from typing import Any

from specache.templates.markers import ControlTokens


class SplitEncoder:
    """Token ids of texts with control tokens at given places, and nowhere else."""

    def __init__(self, tokenizer: Any, tokens: ControlTokens) -> None:
        self._nonce = secrets.token_hex(8)
        self._names = {text: f"q{self._nonce}t{index}q" for index, text in enumerate(tokens.all)}
        self._ids: dict[int, int] = {}  # of the private names -> of the tokens
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = _fast_copy(backend, tokens) if backend is not None else _slow_copy(tokenizer, tokens)
        self._is_fast = backend is not None
        added = {token.content: token for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        for text, name in self._names.items():
            self._ids[self._add(name, added.get(text))] = tokens.all[text]

    def encode(self, pieces: list[tuple[str, str | None]]) -> list[int]:
        """Token ids of pieces of text (text, the control token after it or `None`)."""
        text = "".join(piece + (self._names[token] if token is not None else "") for piece, token in pieces)
        if self._is_fast:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self._ids.get(token_id, token_id) for token_id in ids]

    def _add(self, name: str, token: Any) -> int:
        """Make a private name a token that takes whitespace around it as `token` does. Returns its id."""
        from tokenizers import AddedToken

        flags = {flag: getattr(token, flag, False) for flag in ("lstrip", "rstrip", "normalized")}
        self._tokenizer.add_tokens([AddedToken(name, special=False, single_word=False, **flags)])
        find = self._tokenizer.token_to_id if self._is_fast else self._tokenizer.convert_tokens_to_ids
        return int(find(name))


def _fast_copy(backend: Any, tokens: ControlTokens) -> Any:
    """A copy of a `tokenizers.Tokenizer` to which the control tokens are text."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in tokens.all
    state["truncation"] = state["padding"] = None
    other = Tokenizer.from_str(json.dumps(state))
    other.encode_special_tokens = True
    return other


def _slow_copy(tokenizer: Any, tokens: ControlTokens) -> Any:
    """A copy of a tokenizer written in Python to which the control tokens are text."""
    other = copy.deepcopy(tokenizer)
    for text in tokens.all:
        token_id = other._added_tokens_encoder.pop(text, None)
        other._added_tokens_decoder.pop(token_id, None)
    other.tokens_trie = type(other.tokens_trie)()
    other._update_trie()
    return other
