"""A damaged session is mended, and then goes on as one that never was; what cannot be mended is
left as it is.
"""

from __future__ import annotations

import json
import random
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache import sessions
from specache.engine import repair as repairing
from specache.errors import SessionError
from specache.sessions.lock import FolderLock
from specache.tiers.disk.row_layout import BLOCK_TOKENS
from tests.sessions.sequences import answer, gemma, llama, one, opened, prompt, settings, state

MODELS = {"dense": llama, "hybrid": gemma}
TOKENS = 399


class Saved:
    """A session of two turns, and its next answer."""

    def __init__(self, root: Path, family: str) -> None:
        self.root = root
        self.model = MODELS[family]()
        with opened(root, self.model, settings(policy="verified")) as session:
            ids, _ = answer(self.model, session.cache, prompt(350))
            ids, _ = answer(self.model, session.cache, torch.cat([ids, prompt(30, seed=2)], dim=1))
            session.messages = [{"role": "user", "content": "What is it?"}]
            session.save()
        self.next = torch.cat([ids, prompt(40, seed=3)], dim=1)
        shutil.copytree(root, root.parent / "untouched")
        with opened(root.parent / "untouched", self.model) as session:
            self.expected = answer(self.model, session.cache, self.next)[0]

    def copy(self, to: Path) -> Path:
        shutil.copytree(self.root, to / "sessions")
        return to / "sessions"

    def check(self, root: Path) -> None:
        """What it says next is what it would have said."""
        with opened(root, self.model) as session:
            assert session.messages == [{"role": "user", "content": "What is it?"}]
            assert len(session.token_ids) == TOKENS
            assert torch.equal(answer(self.model, session.cache, self.next)[0], self.expected)


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp(request.param) / "sessions", request.param)


def contents(root: Path) -> dict[str, bytes]:
    """Return all files of the session but the lock."""
    return {path.name: path.read_bytes() for path in sorted((root / "one").iterdir()) if path.name != "lock"}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def row_place(saved: Saved, token: int) -> int:
    """Return a bit of a token's row in a file of rows."""
    layout = next(iter(repairing.inspect(saved.root / "one", "one").manifest.full_layers.values())).rows
    return 8 * (token // BLOCK_TOKENS * layout.block_bytes + token % BLOCK_TOKENS * layout.stride + 5)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_any_file_is_repaired(saved, tmp_path, seed):
    root, chance = saved.copy(tmp_path), random.Random(seed)
    files = [path for path in sorted((root / "one").iterdir()) if path.name != "lock"]
    weights = [path.stat().st_size for path in files] if seed % 2 else None  # as a disk would choose, or each file as often
    path = chance.choices(files, weights)[0]
    flip(path, chance.randrange(8 * path.stat().st_size))
    report = sessions.repair("one", saved.model, folder=root)
    assert report.mended == bool(report.damages)
    assert report.damages or path.suffix == ".rows"  # what pads a block is nobody's
    assert sessions.repair("one", folder=root).damages == ()
    saved.check(root)


@pytest.mark.parametrize("pattern", ["tail-*", "pages-*", "tokens-*", "session.json", "session.json.copy", "*.rows", "windows-*"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_in_every_kind_of_file_is_repaired(saved, tmp_path, pattern, damage):
    root = saved.copy(tmp_path)
    if pattern == "windows-*" and not list((root / "one").glob(pattern)):
        pytest.skip("only hybrids have windows")
    path = one(root, pattern)
    if damage == "flipped":
        flip(path, 8 * (path.stat().st_size // 3))
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-4100])
    else:
        path.unlink()
    report = sessions.repair("one", saved.model, folder=root)
    assert report.mended or (pattern, damage) == ("session.json.copy", "gone")
    assert sessions.repair("one", folder=root).damages == ()
    saved.check(root)


def test_only_the_block_of_a_damaged_row_is_recomputed(tmp_path):
    saved = Saved(tmp_path / "made" / "sessions", "dense")
    root = saved.copy(tmp_path)
    flip(one(root, "*-L001.rows"), row_place(saved, 70))
    before = contents(root)
    report = sessions.repair("one", saved.model, folder=root)
    assert report.tokens_read == BLOCK_TOKENS
    assert [damage.kind for damage in report.damages] == ["rows"]
    assert "layer 1, tokens 64 to 127" in report.damages[0].file
    after = contents(root)
    assert all(after[name] == before[name] for name in after if name in before and name.startswith("pages"))
    with opened(root, saved.model) as mended, opened(saved.root, saved.model) as whole:
        for layer in range(3):
            for mine, other in zip(
                mended.cache.sequences[0].tier.read(layer, 0, 380), whole.cache.sequences[0].tier.read(layer, 0, 380), strict=True
            ):
                assert torch.allclose(mine, other, atol=1e-5)
                assert torch.equal(mine[:, :64], other[:, :64]) and torch.equal(mine[:, 128:], other[:, 128:])


def test_recomputed_low_bit_codes_equal_the_original_ones(saved, tmp_path):
    root = saved.copy(tmp_path)
    with opened(saved.copy(tmp_path / "whole"), saved.model) as session:
        before = state(session)
    flip(one(root, "pages-*"), 20_000)
    assert sessions.repair("one", saved.model, folder=root).tokens_read == 0
    with opened(root, saved.model) as session:
        assert state(session) == before


def test_damage_in_several_places_is_repaired_at_once(saved, tmp_path):
    root = saved.copy(tmp_path)
    for token, pattern in ((3, "*-L001.rows"), (300, "*-L001.rows"), (200, "*-L00[023].rows")):
        flip(one(root, pattern), row_place(saved, token))
    for pattern in ("pages-*", "tail-*", "session.json"):
        flip(one(root, pattern), 3001)
    report = sessions.repair("one", saved.model, folder=root)
    assert {damage.kind for damage in report.damages} == {"rows", "pages", "tail", "manifest"}
    saved.check(root)


@pytest.mark.parametrize("pattern", ["tail-*", "pages-*", "*-L001.rows"])
def test_a_repaired_session_keeps_its_pending_token_and_prompt_length(saved, tmp_path, pattern):
    """Only new tokens may be passed to it, with a mask that covers the token generated last."""
    root = saved.copy(tmp_path)
    flip(one(root, pattern), 8 * 700)
    assert sessions.repair("one", saved.model, folder=root).mended
    new, mask = saved.next[:, TOKENS + 1 :], torch.ones_like(saved.next)
    with opened(saved.root, saved.model) as whole, opened(root, saved.model) as session:
        mine, other = session.cache.sequences[0], whole.cache.sequences[0]
        for name in ("prompt_tokens", "pending_token", "finish_reason"):
            assert getattr(mine, name) == getattr(other, name) is not None
        answered = answer(saved.model, session.cache, new, attention_mask=mask)[0]
    assert torch.equal(answered, saved.expected[:, TOKENS + 1 :])


def test_padding_tokens_in_front_are_text_where_they_were_stored_as_text(tmp_path):
    model, ids = llama(), prompt(100)
    ids[:, :2] = model.config.pad_token_id
    with opened(tmp_path, model, settings(policy="verified")) as session:
        specache.prefill(model, ids, cache=session.cache, attention_mask=torch.ones_like(ids))
        session.save()
    flip(one(tmp_path, "tail-*"), 1600)
    assert sessions.repair("one", model, folder=tmp_path).mended
    with opened(tmp_path, model) as session:
        assert session.token_ids == ids[0].tolist()


def test_a_repair_leaves_a_session_alone_that_changed_meanwhile(saved, tmp_path, monkeypatch):
    root = saved.copy(tmp_path)
    flip(one(root, "*.rows"), row_place(saved, 20))
    theirs = root / "one" / "windows-0123456789abcdef.safetensors"
    mended = repairing.MendedSession
    with ExitStack() as held:

        def somebody_opens_it_first(*arguments: Any, **settings: Any) -> Any:
            held.enter_context(FolderLock(root / "one"))
            theirs.write_bytes(b"new")
            return mended(*arguments, **settings)

        monkeypatch.setattr(repairing, "MendedSession", somebody_opens_it_first)
        with pytest.raises(SessionError, match="in use"):
            sessions.repair("one", saved.model, folder=root)
    assert theirs.exists()


def test_a_session_shorter_than_a_block_is_repaired(tmp_path):
    model = llama()
    for length in (5, 40, 70):
        root = tmp_path / str(length)
        with opened(root, model, settings(policy="verified")) as session:
            answer(model, session.cache, prompt(length))
            session.save()
            expected = session.token_ids
        flip(one(root, "tail-*"), 9000)
        assert sessions.repair("one", model, folder=root).tokens_read > 0
        with opened(root, model) as session:
            assert session.token_ids == expected


@pytest.mark.parametrize("patterns", [("tail-*", "tokens-*"), ("session.json", "session.json.copy")])
def test_irreparable_damage_is_reported_and_nothing_changes(saved, tmp_path, patterns):
    root = saved.copy(tmp_path)
    for pattern in patterns:
        flip(one(root, pattern), 1600)
    before = contents(root)
    for use in (lambda: sessions.repair("one", saved.model, folder=root), lambda: repairing.check("one", folder=root)):
        with pytest.raises(SessionError, match=r"cannot be mended.*Nothing was changed"):
            use()
    assert contents(root) == before


def test_a_repair_without_a_model_recomputes_nothing(saved, tmp_path):
    root = saved.copy(tmp_path)
    flip(one(root, "tail-*"), 1600)
    before = contents(root)
    with pytest.raises(SessionError, match="-m MODEL"):
        sessions.repair("one", folder=root)
    assert contents(root) == before
    with pytest.raises(SessionError, match="other weights"):
        sessions.repair("one", type(saved.model)(saved.model.config).eval(), folder=root)
    assert contents(root) == before
    with pytest.raises(SessionError, match="specache session repair"):
        opened(root, saved.model)


def test_checking_a_session_changes_nothing(saved, tmp_path):
    root = saved.copy(tmp_path)
    assert repairing.check("one", folder=root).damages == ()
    flip(one(root, "*.rows"), 3)
    before = contents(root)
    report = repairing.check("one", folder=root)
    assert report.needs_model and not report.mended
    assert json.loads(json.dumps(report.to_dict()))["damages"][0]["kind"] == "rows"
    assert contents(root) == before


@pytest.mark.parametrize("moment", ["write_mended", "prefill", "write_manifest"])
def test_a_repair_that_stops_in_the_middle_changes_nothing(saved, tmp_path, monkeypatch, moment):
    from specache.sessions import saving

    root = saved.copy(tmp_path)
    flip(one(root, "*.rows"), row_place(saved, 20))
    flip(one(root, "tail-*"), 1600)
    before = contents(root)

    def stop(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving if moment == "write_manifest" else repairing, moment, stop)
        with pytest.raises(KeyboardInterrupt):
            sessions.repair("one", saved.model, folder=root)
    after = contents(root)
    assert {name: after[name][: len(data)] for name, data in before.items()} == before  # files of rows may be longer
    assert set(after) == set(before)
    sessions.repair("one", saved.model, folder=root)
    saved.check(root)


def test_forks_of_a_damaged_session_are_repaired_independently(saved, tmp_path):
    root = saved.copy(tmp_path)
    sessions.fork("one", "two", root)
    path = one(root, "*-L001.rows")
    data = bytearray(path.read_bytes())
    data[row_place(saved, 20) // 8] ^= 4
    with path.open("r+b") as file:  # in place: the fork has a link to it
        file.write(data)
    assert sessions.repair("one", saved.model, folder=root).mended
    assert repairing.check("two", folder=root).damages
    assert sessions.repair("two", saved.model, folder=root).mended
    saved.check(root)


# Sessions of the first version


def old(root: Path) -> None:
    """Rewrite a session as the first version wrote it: no copy of the tokens or of the manifest."""
    from specache.sessions.files import new_digest

    path = root / "one" / "session.json"
    document = json.loads(path.read_text())
    body = document["body"]
    name = body.pop("token_copy")
    del body["files"][name]
    digest = new_digest()
    digest.update(json.dumps(body, sort_keys=True).encode())
    path.write_text(json.dumps({**document, "specache_session": 1, "digest": digest.hexdigest()}, sort_keys=True, indent=1))
    (root / "one" / name).unlink()
    (root / "one" / "session.json.copy").unlink()


def test_a_first_version_session_continues_and_gets_its_copies(saved, tmp_path):
    root = saved.copy(tmp_path)
    old(root)
    assert repairing.check("one", folder=root).damages == ()
    saved.check(root)
    with opened(root, saved.model) as session:
        session.save()
    assert one(root, "tokens-*") and one(root, "session.json.copy")


def test_rows_of_a_first_version_session_are_repaired_but_not_its_tokens(saved, tmp_path):
    root = saved.copy(tmp_path)
    old(root)
    flip(one(root, "*.rows"), row_place(saved, 20))
    assert sessions.repair("one", saved.model, folder=root).mended
    saved.check(root)
    root = saved.copy(tmp_path / "again")
    old(root)
    flip(one(root, "tail-*"), 1600)
    before = contents(root)
    with pytest.raises(SessionError, match="before copies of them were kept"):
        sessions.repair("one", saved.model, folder=root)
    assert contents(root) == before
