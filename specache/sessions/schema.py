"""Parse JSON into a `Manifest` and validate everything, including hostile input.

A valid manifest refers to nothing outside its folder, and its numbers agree with each other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any, TypeVar

from specache.config import PAGE_TOKENS
from specache.sessions.files import StoredFile
from specache.sessions.manifest import (
    ROW_ITEMSIZES,
    Checkpoint,
    Identity,
    LayerShape,
    Manifest,
    Message,
    PageSpan,
    Rendering,
    TailShape,
)
from specache.tiers.disk.extents import Extent
from specache.tiers.disk.row_layout import BLOCK_TOKENS

_MOST = 1 << 40  # largest number accepted
_SNAPSHOT = re.compile(r"(pages|tail|tokens|windows)-[0-9a-f]{16}\.safetensors")
_SEGMENT = re.compile(r"[0-9a-f]{16}")
_ROWS = re.compile(r"[0-9a-f]{16}-L[0-9]{3,6}\.rows")
_DEFAULTS_OF_FIRST_VERSION: dict[str, Any] = {
    "messages": [],
    "token_copy": None,
    "prompt_tokens": None,
    "pending_token": None,
    "decode_steps": None,
    "compiled_steps": None,
    "ring_tokens": None,
    "rendering": None,
}
_T = TypeVar("_T")


def is_data_file(name: str) -> bool:
    """Return True if files of this name hold a session's data."""
    return _SNAPSHOT.fullmatch(name) is not None or _ROWS.fullmatch(name) is not None


def parse(body: Any) -> Manifest:
    """Return the manifest of a JSON value.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, SpeCacheError: it is not valid.
    """
    return _checked(_manifest(body))


def _manifest(body: Any) -> Manifest:
    body = {**_DEFAULTS_OF_FIRST_VERSION, **_mapping(body, _text, lambda value: value)}
    noted_later = {"adapters": None, "code": ""}
    identity: dict[str, Any] = {**noted_later, **_mapping(body["identity"], str, _optional(_text))}
    for values, kind in ((identity, Identity), (body, Manifest)):
        if set(values) != {f.name for f in dataclasses.fields(kind)}:
            raise ValueError("it lacks fields, or has unknown ones")
    return Manifest(
        identity=Identity(**identity),
        settings=_mapping(body["settings"], str, lambda value: value),
        created=_time(body["created"]),
        saved=_time(body["saved"]),
        tokens=_whole(body["tokens"]),
        finish_reason=_optional(_text)(body["finish_reason"]),
        prompt_tokens=_optional(_whole)(body["prompt_tokens"]),
        pending_token=_optional(_whole)(body["pending_token"]),
        decode_steps=_optional(_whole)(body["decode_steps"]),
        compiled_steps=_optional(_whole)(body["compiled_steps"]),
        ring_tokens=_optional(_whole)(body["ring_tokens"]),
        messages=tuple(Message(_text(one["role"]), _text(one["content"])) for one in _list(body["messages"])),
        rendering=_optional(_rendering)(body["rendering"]),
        layers=_mapping(body["layers"], _index, _layer),
        rows=_mapping(body["rows"], _index, lambda extents: tuple(_extent(extent) for extent in _list(extents))),
        tails=_mapping(body["tails"], _index, _tail),
        pages=tuple(_span(span) for span in _list(body["pages"])),
        tail=_optional(lambda name: _snapshot("tail", name))(body["tail"]),
        token_copy=_optional(lambda name: _snapshot("tokens", name))(body["token_copy"]),
        checkpoints=tuple(
            Checkpoint(_snapshot("windows", one["file"]), _whole(one["tokens"], 1)) for one in _list(body["checkpoints"])
        ),
        files=_mapping(body["files"], _text, lambda file: StoredFile(_whole(file["bytes"]), _text(file["digest"]))),
    )


def _checked(manifest: Manifest) -> Manifest:
    """Return the manifest after checking that its parts agree with each other."""
    manifest.config(".")
    tokens, full = manifest.tokens, manifest.full_layers
    if any(value is None for name, value in vars(manifest.identity).items() if name not in ("tokenizer", "adapters")):
        raise ValueError("it does not say which model it belongs to")
    if (tokens == 0) != (manifest.tail is None) or (tokens > 0 and not full):
        raise ValueError("it has tokens without a state, or a state without tokens")
    if (manifest.prompt_tokens or 0) > tokens or (manifest.pending_token is not None and tokens == 0):
        raise ValueError("it has tokens of prompts or answers that are not there")
    if set(manifest.rows) != set(full) or set(manifest.tails) != set(full):
        raise ValueError("it has rows of other layers than it should")
    for layer, extents in manifest.rows.items():
        _ = manifest.layers[layer].rows
        blocks = sum(extent.count for extent in extents)
        if not 0 <= tokens - blocks * BLOCK_TOKENS < BLOCK_TOKENS:
            raise ValueError(f"{blocks} blocks of layer {layer} do not hold {tokens} tokens")
    if sum(span.count for span in manifest.pages) != manifest.low_bit_tokens // PAGE_TOKENS:
        raise ValueError("it has more or fewer pages than its tokens fill")
    lengths = [checkpoint.tokens for checkpoint in manifest.checkpoints]
    if any(a >= b for a, b in pairwise([*lengths, tokens + 1])) or (lengths and not manifest.windows):
        raise ValueError("its checkpoints are not in order")
    used = manifest.snapshots()
    if len(set(used)) != len(used) or set(used) != set(manifest.files):
        raise ValueError("the files that it uses are not those that it lists")
    return manifest


def _whole(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
        raise ValueError(f"{str(value)[:40]!r} is no number from {least} on")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no text")
    return value


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _MOST:
        raise ValueError(f"{str(value)[:40]!r} is no time")
    return float(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:40]!r} is no list")
    return value


def _optional(check: Callable[[Any], _T]) -> Callable[[Any], _T | None]:
    return lambda value: None if value is None else check(value)


def _mapping(value: Any, key: Callable[[Any], Any], item: Callable[[Any], _T]) -> dict[Any, _T]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{str(value)[:40]!r} is no object")
    return {key(name): item(each) for name, each in value.items()}


def _index(text: str) -> int:
    if re.fullmatch("0|[1-9][0-9]{0,4}", text) is None:
        raise ValueError(f"{text[:40]!r} is no layer")
    return int(text)


def _snapshot(kind: str, name: Any) -> str:
    if not _text(name).startswith(f"{kind}-") or _SNAPSHOT.fullmatch(name) is None:
        raise ValueError(f"{name[:100]!r} is no file of {kind}")
    return _text(name)


def _extent(value: Any) -> Extent:
    if _SEGMENT.fullmatch(_text(value["segment"])) is None:
        raise ValueError(f"{value['segment'][:40]!r} is no segment")
    return Extent(value["segment"], _whole(value["first_block"]), _whole(value["count"], 1))


def _span(value: Any) -> PageSpan:
    count = _whole(value["count"], 1)
    return PageSpan(_snapshot("pages", value["file"]), count, _whole(value["stored"], count))


def _rendering(value: Any) -> Rendering:
    datetime.fromisoformat(_text(value["date"]))
    return Rendering(value["date"], _text(value["template"]), _mapping(value["variables"], _text, lambda each: each))


def _tail(value: Any) -> TailShape:
    if not isinstance(value["weights"], bool):
        raise ValueError("it does not say whether there are key weights")
    return TailShape(value["weights"], _optional(_whole)(value["queries"]), _optional(_whole)(value["wanted"]))


def _layer(value: Any) -> LayerShape:
    if value["dtype"] not in ROW_ITEMSIZES:
        raise ValueError(f"{str(value['dtype'])[:40]!r} is no number format of rows")
    window = _optional(lambda tokens: _whole(tokens, 1))(value["window"])
    return LayerShape(_whole(value["heads"], 1), _whole(value["dim"], 1), value["dtype"], window)
