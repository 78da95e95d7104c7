"""The bytes that each token stands for, which `logprobs` report."""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space


class TokenBytes:
    """Maps token ids to bytes for tokenizers of bytes (GPT-2's kind) and of SentencePiece."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {index: token.content for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        self._of_character = _byte_alphabet() if _decodes_bytes(tokenizer) else None

    def __call__(self, token_id: int) -> bytes:
        """Return the bytes of a token; a special token's are its name's."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        token = token.decode("utf-8", "replace") if isinstance(token, bytes) else str(token)
        if self._of_character is not None and all(character in self._of_character for character in token):
            return bytes(self._of_character[character] for character in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode("utf-8", "replace")

    def text(self, token_id: int) -> str:
        """Return a token's text; part of a character as OpenAI spells it: `bytes:\\xe2\\x82`."""
        data = self(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _decodes_bytes(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return hasattr(tokenizer, "byte_decoder")
    state = json.loads(backend.decoder.__getstate__())
    return any(one.get("type") == "ByteLevel" for one in [state, *state.get("decoders", [])])


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character that byte-level tokenizers write (GPT-2)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in visible]
    return {**{chr(byte): byte for byte in visible}, **{chr(256 + index): byte for index, byte in enumerate(rest)}}
