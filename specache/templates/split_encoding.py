"""Tokenise a text in which some markers are control tokens and others, spelled the same, are text.

Tokenizers do one or the other for a whole text; the encoders here do both.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from specache.templates.markers import ControlTokens

Pieces = list[tuple[str, str | None]]  # (text, the control token after it or `None`)


def split_encoder(tokenizer: Any, tokens: ControlTokens) -> SplitEncoder:
    """Return the encoder of a tokenizer. It encodes control tokens at given places only."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return PythonSplitEncoder(tokenizer, tokens) if backend is None else FastSplitEncoder(backend, tokens)


class FastSplitEncoder:
    """Encodes with a copy of a `tokenizers.Tokenizer`.

    The copy knows each control token under a private name, which is inserted where the token is
    meant; the marker itself is plain text to it. The tokenizer processes the text as a whole, so
    words merge at the seams as usual.
    """

    def __init__(self, backend: Any, tokens: ControlTokens) -> None:
        from tokenizers import AddedToken, Tokenizer

        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None
        flags = {}
        for token in state["added_tokens"]:
            if token["content"] in tokens.all:
                token["special"] = True  # makes `encode_special_tokens` split it
                flags[token["content"]] = {flag: token[flag] for flag in ("lstrip", "rstrip", "normalized")}
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        self._tokenizer.encode_special_tokens = True
        nonce = secrets.token_hex(8)
        self._names = {text: f"q{nonce}t{index}q" for index, text in enumerate(tokens.all)}
        self._tokenizer.add_tokens([AddedToken(name, special=False, **flags.get(text, {})) for text, name in self._names.items()])
        self._ids = {self._tokenizer.token_to_id(name): tokens.all[text] for text, name in self._names.items()}

    def encode(self, pieces: Pieces) -> list[int]:
        text = "".join(piece + (self._names[token] if token is not None else "") for piece, token in pieces)
        return [self._ids.get(token_id, token_id) for token_id in self._tokenizer.encode(text, add_special_tokens=False).ids]


class PythonSplitEncoder:
    """Encodes piece by piece with a tokenizer written in Python, as its own `tokenize` does."""

    def __init__(self, tokenizer: Any, tokens: ControlTokens) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens.all
        self._added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        others = sorted((text for text in self._added if text not in tokens.all), key=len, reverse=True)
        self._others = re.compile("|".join(map(re.escape, others))) if others else None

    def encode(self, pieces: Pieces) -> list[int]:
        ids: list[int] = []
        before: str | None = None
        for piece, token in pieces:
            if before in self._added and self._added[before].rstrip:
                piece = piece.lstrip()
            if token in self._added and self._added[token].lstrip:
                piece = piece.rstrip()
            ids += self._plain(piece)
            if token is not None:
                ids.append(self._tokens[token])
            before = token
        return ids

    def _plain(self, text: str) -> list[int]:
        """Return the token ids of a text without control tokens. Other added tokens are tokens."""
        ids: list[int] = []
        start = 0
        for match in self._others.finditer(text) if self._others else ():
            ids += [*self._words(text[start : match.start()]), self._tokenizer.convert_tokens_to_ids(match.group())]
            start = match.end()
        return ids + self._words(text[start:])

    def _words(self, text: str) -> list[int]:
        return [self._tokenizer._convert_token_to_id(token) for token in self._tokenizer._tokenize(text)] if text else []


SplitEncoder = FastSplitEncoder | PythonSplitEncoder
