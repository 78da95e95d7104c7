"""Damage, a full disk, another model: a clear error, the last state intact, never a wrong token."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache import sessions
from specache.errors import ConfigError, CorruptRowError, SessionError, SlowTierError, SpeCacheError
from specache.sessions import checkpoints
from specache.tiers.disk import aligned_io
from specache.tiers.disk.disk_tier import DiskTier
from tests.cli.tiny_chat import byte_tokenizer
from tests.sessions.sequences import answer, checkpoints_every, gemma, llama, one, opened, prefill, prompt, settings, state
from tests.tiers.tier_rows import nothing_left


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# Damaged files


@pytest.mark.parametrize("pattern", ["*.rows", "tail-*", "pages-*", "session.json"])
@pytest.mark.parametrize("damage", ["removed", "cut", "emptied", "a folder", "a link"])
def test_opening_a_damaged_session_names_the_file(root, model, pattern, damage):
    path = one(root, pattern)
    if damage in ("cut", "emptied"):
        path.write_bytes(path.read_bytes()[:-5000] if damage == "cut" else b"")
    else:
        path.unlink()
        if damage == "a folder":
            path.mkdir()
        if damage == "a link":
            path.symlink_to(one(root, pattern, "another"))
    if path.name == "session.json" and damage == "removed":
        (root / "one" / "session.json.copy").unlink()
        with pytest.raises(SessionError, match="Nothing was saved"):
            sessions.show("one", root)
    else:
        with nothing_left(root), pytest.raises(SpeCacheError, match=path.name):
            opened(root, model)
    with opened(root, model, name="another") as session:
        assert len(session.token_ids) == 300


@pytest.mark.parametrize("pattern", ["*.rows", "tail-*", "pages-*", "session.json"])
def test_a_file_from_another_session_is_refused(root, model, pattern):
    path = one(root, pattern)
    shutil.copy(one(root, pattern, "another"), path)
    named = "No such file" if pattern == "session.json" else path.name  # what the other manifest refers to is not here
    with nothing_left(root), pytest.raises(SpeCacheError, match=named), opened(root, model) as session:
        session.cache.sequences[0].tier.read(0, 0, 256)


def test_a_missing_manifest_is_an_error_and_not_a_new_session(root, model):
    """Otherwise everything in the folder would be removed as garbage."""
    one(root, "session.json").unlink()
    before = sorted(path.name for path in (root / "one").iterdir())
    with nothing_left(root), pytest.raises(SessionError, match="specache session repair"):
        opened(root, model)
    assert sorted(path.name for path in (root / "one").iterdir()) == before
    assert "its copy is there" in str(sessions.stored(root)[1].problem)


def test_a_session_opens_although_its_copies_are_damaged(root, model, saved_state):
    for pattern in ("session.json.copy", "tokens-*"):
        flip(one(root, pattern), -40)
    with opened(root, model) as session:
        assert state(session) == saved_state


def test_a_flipped_bit_in_any_file_is_detected(root, model):
    for path in sorted((root / "one").iterdir()):
        if path.name in ("lock", "session.json.copy") or path.name.startswith("tokens-"):
            continue
        data = path.read_bytes()
        for place in sorted({0, 7, 8, 9, len(data) // 2, len(data) - 1}):
            flip(path, place)
            if path.suffix == ".rows":
                padding = place == len(data) - 1
                with opened(root, model) as session:
                    layer = int(path.stem[-3:])
                    if padding:
                        session.cache.sequences[0].tier.read(layer, 0, 300)
                    else:
                        with pytest.raises(CorruptRowError, match=path.name):
                            session.cache.sequences[0].tier.read(layer, 0, 300)
            else:
                with pytest.raises(SessionError, match=path.name):
                    opened(root, model)
            path.write_bytes(data)
    with opened(root, model) as session:
        assert len(session.token_ids) == 300


def test_a_damaged_row_raises_while_answering(root, model):
    for path in (root / "one").glob("*.rows"):
        for place in range(0, path.stat().st_size, 264):
            flip(path, place)
    with opened(root, model) as session, pytest.raises(CorruptRowError, match="token"):
        answer(model, session.cache, torch.cat([prompt(300), prompt(50, 1)], dim=1))


def test_a_damaged_checkpoint_is_reported_and_an_earlier_one_used(tmp_path, monkeypatch):
    checkpoints_every(monkeypatch, 140)
    hybrid = gemma()
    with opened(tmp_path, hybrid, settings()) as session:
        prefill(session, hybrid, prompt(300))
        session.save()
        saved = state(session)
        kept = {one.tokens: tmp_path / "one" / one.file for one in session.cache.sequences[0].checkpoints.kept}
        assert sorted(kept) == [140, 280, 300]
    path = kept[280]
    flip(path, -1)
    with opened(tmp_path, hybrid) as session:
        with pytest.warns(UserWarning, match=path.name):
            assert session.cut(290) == 140
        prefill(session, hybrid, prompt(300))
        assert state(session) == saved
    path.unlink()
    with pytest.raises(SessionError, match=path.name):
        opened(tmp_path, hybrid)


def test_without_an_intact_checkpoint_the_prompt_is_prefilled_again(tmp_path, monkeypatch):
    checkpoints_every(monkeypatch, 140)
    hybrid = gemma()
    with opened(tmp_path, hybrid, settings()) as session:
        prefill(session, hybrid, prompt(300))
        session.save()
        saved = state(session)
        first = tmp_path / "one" / session.cache.sequences[0].checkpoints.kept[0].file
    flip(first, -1)
    with opened(tmp_path, hybrid) as session:
        with pytest.warns(UserWarning, match=first.name):
            assert session.cut(200) == 0
        prefill(session, hybrid, prompt(300))
        session.save()
        assert state(session) == saved
    with opened(tmp_path, hybrid) as session:
        assert first.name not in session.cache.sequences[0].checkpoints.files and state(session) == saved


def test_a_prefill_that_fails_over_a_damaged_checkpoint_raises_its_own_error(tmp_path, monkeypatch):
    """Undoing looks for a checkpoint, since the key scales are of more tokens than there were."""
    checkpoints_every(monkeypatch, 10)
    hybrid, ids = gemma(), prompt(300)
    with opened(tmp_path, hybrid, settings(), "fresh") as session:
        prefill(session, hybrid, ids)
        fresh = state(session)
    with opened(tmp_path, hybrid, settings()) as session:
        prefill(session, hybrid, ids[:, :20])
        session.save()
        damaged = tmp_path / "one" / session.cache.sequences[0].checkpoints.kept[0].file
        flip(damaged, -1)
        write, written = checkpoints.write_snapshot, []

        def fail_after_two(path: Path, specs: Any) -> Any:
            written.append(path)
            if len(written) == 2:
                raise SlowTierError("the disk is gone")
            return write(path, specs)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "write_snapshot", fail_after_two)
            with pytest.raises(SlowTierError, match="the disk is gone"):
                prefill(session, hybrid, ids)
        assert session.token_ids == [] and not session.cache.sequences[0].layers
        prefill(session, hybrid, ids)
        assert state(session) == fresh
        session.save()
    with opened(tmp_path, hybrid) as session:
        assert state(session) == fresh


# Closing


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("saved", [True, False])
def test_a_cache_that_fails_to_close_does_not_keep_the_session(root, model, monkeypatch, error, saved):
    name = "one" if saved else "new"
    close = DiskTier.close
    with nothing_left(root):
        session = opened(root, model, settings(), name)
        prefill(session, model, prompt(350))

        def fail(tier: DiskTier) -> None:
            close(tier)
            raise error("the tier is stuck")

        with monkeypatch.context() as patch:
            patch.setattr(DiskTier, "close", fail)
            with pytest.raises(error, match="the tier is stuck"):
                session.close()
        with opened(root, model, settings(), name) as again:
            assert len(again.token_ids) == (300 if saved else 0)


# Disks


@pytest.mark.usefixtures("plain_reads")
def test_a_full_disk_while_saving_leaves_the_last_state(root, model, monkeypatch):
    write = aligned_io.write_at
    with opened(root, model) as session:
        last = state(session)
        prefill(session, model, torch.cat([prompt(300), prompt(200, 7)], dim=1))
        new = state(session)
        saved = False
        for room in range(0, 3000, 7):
            left = iter(range(room))

            def full(fd: int, data: memoryview, offset: int, left: Any = left) -> int:
                if next(left, None) is None:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(fd, data[: max(1, len(data) // 2)], offset)

            try:
                with monkeypatch.context() as patch:
                    patch.setattr(aligned_io, "write_at", full)
                    session.save()
                saved = True
                break
            except SessionError as error:
                assert "No space left" in str(error) and "intact" in str(error)
            copy = root / f"copy{room}"
            shutil.copytree(root / "one", copy / "one")
            with opened(copy, model) as other:
                assert state(other) == last
        assert saved and room > 100
        assert state(session) == new
    with opened(root, model) as session:
        assert state(session) == new


def test_a_full_disk_while_prefilling_leaves_the_last_state(root, model, monkeypatch):
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    longer = torch.cat([prompt(300), prompt(200, 7)], dim=1)
    with opened(root, model) as session:
        last = state(session)
        with monkeypatch.context() as patch, pytest.raises(SlowTierError, match="No space left"):
            patch.setattr(aligned_io, "write_at", full)
            prefill(session, model, longer)
        assert state(session) == last
        prefill(session, model, longer)
        session.save()
        new = state(session)
    with opened(root, model) as session:
        assert state(session) == new


@pytest.mark.parametrize("step", ["fsync", "fdatasync", "replace"])
def test_a_disk_that_fails_while_saving_leaves_the_last_state(root, model, monkeypatch, step):
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(root, model) as session:
        last = state(session)
        prefill(session, model, torch.cat([prompt(300), prompt(200, 7)], dim=1))
        with monkeypatch.context() as broken:
            broken.setattr(*((Path, "replace") if step == "replace" else (os, step)), fail)
            with pytest.raises((SessionError, SlowTierError), match="Input/output error"):
                session.save()
    with opened(root, model) as session:
        assert state(session) == last


def test_a_session_in_an_unwritable_folder_is_refused(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(SessionError, match="cannot be made"):
        opened(tmp_path / "file" / "root", model)
    (tmp_path / "one").write_text("")
    with pytest.raises(SessionError, match="cannot be made"):
        opened(tmp_path, model)


def test_a_session_without_write_permission_is_refused(root, model, monkeypatch):
    """Permissions are simulated, since the tests may run as root."""
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(root)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", refuse)
    with nothing_left(root), pytest.raises(SessionError, match=r"Permission denied.*Choose a folder that you may write"):
        opened(root, model)


# Another model


def test_another_model_is_refused_with_the_reason(root, model):
    cases: list[tuple[Any, str]] = [
        (llama(seed=1), "other weights"),
        (llama(num_hidden_layers=2), "another configuration"),
        (llama(rope_theta=5000.0), "another configuration"),
        (llama().to(torch.bfloat16), "float32 pairs.*bfloat16"),
        (gemma(), "belongs to a LlamaForCausalLM.*Gemma2ForCausalLM"),
    ]
    changed = llama()
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight.mul_(1.01)
    cases.append((changed, "other weights"))
    for other, why in cases:
        with nothing_left(root), pytest.raises(SessionError, match=why):
            opened(root, other)
    opened(root, llama()).close()


def test_a_session_opens_for_its_model_loaded_from_another_place(root, model, tmp_path):
    model.save_pretrained(tmp_path / "moved")
    from transformers import AutoModelForCausalLM

    opened(root, AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.float32)).close()


@pytest.mark.parametrize("changes", [{"bits": 4}, {"code": "kivi"}, {"group_size": 32}, {"residual": 32}])
def test_other_settings_of_the_low_bit_copy_are_refused(root, model, changes):
    ((name, value),) = changes.items()
    with pytest.raises(SessionError, match=f"{name} .* and is opened with {name} {value}"):
        opened(root, model, settings(**changes))


@pytest.mark.parametrize(("changes", "why"), [({"policy": "full"}, "full"), ({"slow_tier": "ram"}, "on disk")])
def test_settings_that_no_session_can_have(tmp_path, model, changes, why):
    with pytest.raises(ConfigError, match=why):
        opened(tmp_path, model, settings(**changes))
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_refused(tmp_path, model):
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    other.add_tokens(["<more>"])
    with opened(tmp_path, model, settings(), tokenizer=tokenizer) as session:
        prefill(session, model, prompt(50))
        session.save()
    with pytest.raises(SessionError, match="another tokenizer"):
        opened(tmp_path, model, tokenizer=other)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)  # leaves settings behind in the tokenizer
    opened(tmp_path, model, tokenizer=tokenizer).close()
    with opened(tmp_path, model) as session:  # not knowing is no contradiction
        session.save()
    with pytest.raises(SessionError, match="another tokenizer"):
        opened(tmp_path, model, tokenizer=other)


def test_fast_memory_that_is_too_small_is_refused(root, model):
    with nothing_left(root), pytest.raises(specache.FastMemoryError):
        opened(root, model, settings(fast_memory=10_000))
    opened(root, model).close()
