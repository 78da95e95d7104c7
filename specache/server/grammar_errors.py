"""What llguidance says about a grammar, as a user of the server should read it."""

from __future__ import annotations

import re

_KEYS = re.compile(r"Unimplemented keys: \[(.*?)\]")
_REGEX_REASON = re.compile(r"^error: (.*)$", re.MULTILINE)
_LONGEST = 300  # characters
_IN_SCHEMA = "at 1(8): failed to compile JSON schema: "  # the place is that in our own line of Lark


def readable(message: str) -> str:
    """Return one sentence, without its full stop."""
    keys = _KEYS.search(message)
    if keys is not None:
        names = keys[1].replace('"', "")
        return f"the JSON schema has keywords that this server cannot hold an answer to: {names}. Leave them out"
    if "oneOf constraints" in message:
        return "oneOf: its options overlap, or may. Use anyOf, or options that a constant or a type tells apart"
    if "NoExtension" in message:
        return "no text can match it"
    reason = _REGEX_REASON.search(message)
    if reason is not None:
        return f"a regular expression is not valid here: {_first_line(reason[1])}"
    return _first_line(message)


def _first_line(message: str) -> str:
    line = message.strip().removeprefix(_IN_SCHEMA).split("\n", 1)[0].strip()[:_LONGEST].rstrip(".:")
    return "".join(character if character.isprintable() else "?" for character in line)
