"""Hostile manifests and snapshots are refused, or read as what they say."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from specache.errors import SessionError, SpeCacheError
from specache.sessions import manifest_file
from specache.sessions.files import new_digest
from specache.sessions.manifest import Rendering
from tests.sessions.sequences import one, opened, state

# The manifest


def edited(root: Path, edit: Callable[[Any], None], *, signed: bool = True, name: str = "one") -> None:
    """Change the manifest's body, with a valid digest if `signed`."""
    path = root / name / "session.json"
    document = json.loads(path.read_text())
    edit(document["body"])
    if signed:
        digest = new_digest()
        digest.update(json.dumps(document["body"], sort_keys=True).encode())
        document["digest"] = digest.hexdigest()
    path.write_text(json.dumps(document))


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    def edit(body: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = value

    return edit


def test_a_manifest_cut_anywhere_is_refused(root, model):
    path = root / "one" / "session.json"
    data = path.read_bytes()
    for length in range(0, len(data) - 1, 97):
        path.write_bytes(data[:length])
        with pytest.raises(SessionError, match=r"session\.json"):
            opened(root, model)


def test_a_manifest_that_was_edited_is_refused(root, model):
    edited(root, put("tokens", value=299), signed=False)
    with pytest.raises(SessionError, match="digest"):
        opened(root, model)


@pytest.mark.parametrize("key", ["specache_session", "rows_layout"])
def test_a_manifest_of_a_newer_version_is_refused(root, model, key):
    path = root / "one" / "session.json"
    document = json.loads(path.read_text())
    document[key] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(SessionError, match="newer specache"):
        opened(root, model)


@pytest.mark.parametrize(
    "edit",
    [
        put("tokens", value=299),
        put("tokens", value=-1),
        put("tokens", value=10**15),
        put("tokens", value="300"),
        put("tail", value="../another/tail.safetensors"),
        put("tail", value=None),
        put("pages", value=[]),
        put("pages", 0, "count", value=10**9),
        put("pages", 0, "stored", value=1),
        put("pages", 0, "file", value="/etc/passwd"),
        put("rows", "0", 0, "segment", value="../../../../x"),
        put("rows", "0", 0, "segment", value="0123456789abcdef"),
        put("rows", "0", 0, "first_block", value=10**6),
        put("rows", "0", 0, "count", value=3),
        put("rows", "0", value=[]),
        put("rows", value={}),
        put("layers", value={}),
        put("layers", "0", "heads", value=1),
        put("layers", "0", "heads", value=10**12),
        put("layers", "0", "dim", value=8),
        put("layers", "0", "dtype", value="int64"),
        put("layers", "0", "dtype", value="bfloat16"),
        put("layers", "0", "window", value=16),
        put("layers", "3", value={"heads": 2, "dim": 16, "dtype": "float32", "window": None}),
        put("tails", "0", "queries", value=10**9),
        put("tails", "0", "weights", value=False),
        put("tails", "0", "wanted", value=4),
        put("settings", "bits", value=4),
        put("settings", "bits", value=3),
        put("settings", "group_size", value=64),
        put("settings", "surprise", value=1),
        put("settings", value=None),
        put("files", value={}),
        put("checkpoints", value=[{"file": "windows-0123456789abcdef.safetensors", "tokens": 100}]),
        put("identity", "model", value=None),
        put("identity", value={}),
        put("extra", value=1),
    ],
)
def test_a_manifest_that_contradicts_itself_or_its_files_is_refused(root, model, edit):
    edited(root, edit)
    with pytest.raises(SpeCacheError), opened(root, model) as session:
        session.cache.sequences[0].tier.read(0, 0, 300)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_of_a_manifest_replaced_by_anything_is_refused_or_read(made, data):
    document = json.loads((made / "one" / "session.json").read_text())
    place, body = document["body"], document["body"]
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = data.draw(JSON)
    text = json.dumps(body, sort_keys=True)
    digest = new_digest()
    digest.update(text.encode())
    document["digest"] = digest.hexdigest()
    with contextlib.suppress(SessionError):
        manifest_file.decode(json.dumps(document).encode(), "it")


# Snapshots


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), which=st.sampled_from(["tail-*", "pages-*"]))
def test_a_hostile_safetensors_header_is_refused(made, saved_state, tmp_path, model, data, which):
    """Digest and size in the manifest are those of the hostile file."""
    root = tmp_path / "hostile"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(made / "one", root / "one")
    path = one(root, which)
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header, rest = json.loads(good[8 : 8 + size]), good[8 + size :]
    bad = data.draw(st.sampled_from(["length", "bytes", "field", "text", "cut", "extra"]))
    numbers = st.integers(-(2**70), 2**70) | st.integers(-4, 4) | st.sampled_from([2**31, 2**32, 2**63 - 1, 2**64, len(rest)])
    if bad == "length":
        size = data.draw(st.integers(0, 2**64 - 1) | st.integers(0, len(good) + 9))
        text = good[8:][: len(good[8:]) - len(rest)]
    elif bad == "bytes":
        text = data.draw(st.binary(max_size=200))
        size = len(text)
    else:
        name = data.draw(st.sampled_from(sorted(header)))
        entry = header[name]
        if bad == "field":
            field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            value = (
                st.sampled_from(["F64", "U8", "BOOL", "F8_E4M3", "X", ""]) if field == "dtype" else st.lists(numbers, max_size=4)
            )
            entry[field] = data.draw(value | JSON)
        elif bad == "extra":
            header[data.draw(st.text(max_size=10))] = data.draw(JSON | st.just(entry))
        elif bad == "cut":
            del header[name]
        text = json.dumps(header).encode()
        if bad == "text":
            place = data.draw(st.integers(0, len(text) - 1))
            text = text[:place] + data.draw(st.binary(min_size=1, max_size=3)) + text[place + 1 :]
        size = len(text)
    hostile = size.to_bytes(8, "little") + text + rest
    path.write_bytes(hostile)
    digest = new_digest()
    digest.update(hostile)
    edited(root, put("files", path.name, value={"bytes": len(hostile), "digest": digest.hexdigest()}))
    try:
        with opened(root, model) as session:
            found = state(session)
    except SpeCacheError as error:
        assert path.name in str(error)
    else:
        assert found == saved_state  # what was changed means the same


def test_the_rendering_of_a_conversation_is_stored_and_validated(root, model, saved_state):
    path = root / "one" / "session.json"
    document = json.loads(path.read_text())

    def with_rendering(value: Any) -> None:
        body = {**document["body"], "rendering": value}
        digest = new_digest()
        digest.update(json.dumps(body, sort_keys=True).encode())
        path.write_text(json.dumps({**document, "digest": digest.hexdigest(), "body": body}))

    good = {"date": "2024-07-26T09:30:00", "template": "0" * 64, "variables": {"enable_thinking": False}}
    with_rendering(good)
    with opened(root, model) as session:
        assert state(session) == saved_state and session.rendering == Rendering(**good)
        session.save()
    with opened(root, model) as session:
        assert session.rendering == Rendering(**good)
    for wrong in ("text", {}, {**good, "date": "yesterday"}, {**good, "template": 3}, {**good, "variables": [1]}):
        with_rendering(wrong)
        with pytest.raises(SessionError, match="damaged"):
            opened(root, model)


def test_messages_of_a_manifest_are_validated(root, model, saved_state):
    """The first manifests had none; others have two texts per message."""
    path = root / "one" / "session.json"
    document = json.loads(path.read_text())

    def with_messages(*messages: Any) -> None:
        body = {name: value for name, value in document["body"].items() if name != "messages"}
        body |= {"messages": messages[0]} if messages else {}
        digest = new_digest()
        digest.update(json.dumps(body, sort_keys=True).encode())
        path.write_text(json.dumps({**document, "digest": digest.hexdigest(), "body": body}))

    with_messages()
    with opened(root, model) as session:
        assert state(session) == saved_state and session.messages == []
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "\ud800 \x1b[2J"}]
    with_messages(said)
    with opened(root, model) as session:
        assert session.messages == said
    for wrong in (None, "text", [1], [{"role": "user"}], [{"role": "user", "content": 3}], {"role": "user", "content": "x"}):
        with_messages(wrong)
        with pytest.raises(SessionError, match="damaged"):
            opened(root, model)
