"""API keys: a file of them, and whose key a request carries."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from pathlib import Path

from specache.errors import ConfigError
from specache.platform.text_files import decode_text

SHORTEST_KEY = 16  # characters; shorter ones can be guessed
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[\x21-\x7e]+")
_MOST_BYTES = 2**20


class KeyRing:
    """The keys that a server accepts, and the name of each one's owner.

    Only digests are kept. A name is what stored prefixes belong to, also after a restart. A key
    without one is named after its digest, so that its place in the file does not matter.
    """

    def __init__(self, keys: dict[str, str]) -> None:
        """Keep keys by their owners' names."""
        self._owners = {_digest(key): name for name, key in keys.items()}

    def owner(self, presented: str) -> str | None:
        """Return the name of a key's owner; `None` for an unknown key.

        Every key is compared, each in constant time, so the answer's time tells nothing.
        """
        digest, found = _digest(presented), None
        for known, name in self._owners.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    @classmethod
    def load(cls, path: Path) -> KeyRing:
        """Read a file with `KEY` or `NAME:KEY` on each line. Empty lines and `#` are left out.

        Raises:
            ConfigError: others may read the file, it holds no keys, or a line is not a key.
        """
        keys: dict[str, str] = {}
        for number, line in enumerate(_read(path).splitlines(), 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, colon, key = text.partition(":")
            if not colon:
                name, key = f"key-{hashlib.sha256(text.encode()).hexdigest()[:12]}", text
            _check(path, number, name, key)
            if name in keys or key in keys.values():
                raise ConfigError(f"line {number} of {path} has a key or a name of a line before it. Use each once.")
            keys[name] = key
        if not keys:
            raise ConfigError(f"{path} holds no key. Write one per line, for example with: openssl rand -hex 24")
        return cls(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _read(path: Path) -> str:
    """Return the text of a key file that nobody else may read."""
    try:
        with path.expanduser().open("rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise ConfigError(f"the key file {path} is not an ordinary file.")
            if facts.st_mode & 0o077:
                raise ConfigError(f"others may read the key file {path}. Make it yours alone: chmod 600 {path}")
            data = file.read(_MOST_BYTES + 1)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of an unknown user
        raise ConfigError(f"cannot read the key file {path}: {getattr(error, 'strerror', None) or error}.") from None
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"the key file {path} is longer than {_MOST_BYTES:,} bytes. Is it another file? Pass one of keys alone.")
    return decode_text(data, f"the key file {path}", ConfigError)


def _check(path: Path, number: int, name: str, key: str) -> None:
    place = f"line {number} of {path}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{place} has a name that is not of letters, digits, '.', '_' and '-'. Write NAME:KEY, or KEY alone.")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{place} has a key with a space or a character that is not ASCII.")
    if len(key) < SHORTEST_KEY:
        raise ConfigError(f"{place} has a key of {len(key)} characters; use {SHORTEST_KEY} or more (openssl rand -hex 24).")
