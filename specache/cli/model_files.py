"""Check the small files beside a model's weights, which transformers passes over or reads without
naming them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TEMPLATE = "chat_template.jinja"
_PASSED_OVER = ("generation_config.json", "tokenizer_config.json", _TEMPLATE)  # faults of these may end no loading
_OTHERS = ("config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json")
_Rule = tuple[Callable[[Any], bool], str]  # whether a value fits, and in words what does


def fault(source: str, revision: str | None, *, loaded: bool) -> str | None:
    """Return what is wrong with the first faulty file of a model; `None` if none is found.

    Files of a hub model are looked up in the local cache, without the network.

    Args:
        source: a folder or a hub name.
        revision: of a hub model.
        loaded: True if transformers has loaded the model: what it must have read is not read again.
    """
    folder = Path(source)
    for name in _PASSED_OVER if loaded else _OTHERS + _PASSED_OVER:
        path = folder / name if folder.is_dir() else _cached(source, name, revision)
        if path is not None and path.is_file() and (wrong := _fault_of(path, name)):
            return f"{path} {wrong}"
    return None


def _cached(repository: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, name, revision=revision)
    except ValueError:  # no name of a repository
        return None
    return Path(found) if isinstance(found, str) else None


def _fault_of(path: Path, name: str) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
        if name == _TEMPLATE:
            return None if text.strip() else "is empty. Download it again, or remove it to use that of tokenizer_config.json."
        value = json.loads(text)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}."
    except ValueError as error:  # no UTF-8, or no JSON
        return f"is damaged or was cut off: {error}. Download it again."
    if not isinstance(value, dict):
        return f"has a JSON {_kind(value)} instead of an object. Download it again."
    return _fault_of_values(value, _VALUES.get(name, {}))


def _fault_of_values(values: dict[str, Any], rules: dict[str, _Rule]) -> str | None:
    for name, (fits, expected) in rules.items():
        value = values.get(name)
        if value is not None and not fits(value):
            return f"has {json.dumps(value)} as {name}, which must be {expected}. Correct it there."
    return None


def _kind(value: Any) -> str:
    return {list: "list", str: "text", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _one_or_list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: fits(value) or _list_of(fits)(value)


_LENGTH = (_is_number, "a number of tokens")
_VALUES: dict[str, dict[str, _Rule]] = {  # what commands or transformers' generate use, and nobody has checked
    "generation_config.json": {
        "eos_token_id": (_one_or_list(_is_id), "a token id or a list of token ids"),
        "pad_token_id": (_is_id, "a token id"),
        "stop_strings": (_one_or_list(_is_text), "a text or a list of texts"),
        "suppress_tokens": (_list_of(_is_id), "a list of token ids"),
        "begin_suppress_tokens": (_list_of(_is_id), "a list of token ids"),
        "bad_words_ids": (_list_of(_list_of(_is_id)), "a list of lists of token ids"),
        "max_length": _LENGTH,
        "min_length": _LENGTH,
        "no_repeat_ngram_size": _LENGTH,
    },
    "tokenizer_config.json": {
        "model_max_length": _LENGTH,
        "chat_template": (lambda value: _is_text(value) or isinstance(value, list | dict), "a text"),
    },
}
