"""Prefixes on the disk survive a restart, are verified, and stay below their limit."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from specache.engine import prefix_writer
from specache.engine.prefix_store import PrefixStore
from specache.errors import ConfigError
from specache.sessions import prefix_files
from specache.sessions.names import _UNFINISHED
from specache.sessions.prefix_files import is_prefix_name, owner_digest
from tests.engine.prefixes import MODELS, TIERS, Server, answer, branch, config, fresh, text
from tests.engine.serving import PATIENCE
from tests.sessions.sequences import checkpoints_every
from tests.tiny import llama

CUTS = {"in the residual": 390, "inside a page": 300, "at a page's border": 256, "at a group's border": 288, "near the start": 97}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "prefixes"


def opened(model: Any, root: Path, settings: Any = None, **more: Any) -> Server:
    settings = settings or config()
    return Server(model, settings, PrefixStore(model, settings, folder=root, **more))


def stored(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if is_prefix_name(path.name))


def row_files(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.rows")]


def written(server: Server) -> None:
    """Wait until everything that waits is on the disk, and what it replaces is gone."""
    writer = server.store._disk._writer
    for prefix in writer.pending():
        writer.wait_for(prefix)
    server.store.match("", text(1))  # takes note of it, and has shorter ones removed
    with writer._changed:
        writer._changed.wait_for(lambda: not writer._waiting and writer._now is None)


def write(model: Any, root: Path, *texts: list[int], **more: Any) -> None:
    """Read prompts in a server that ends."""
    server = opened(model, root, **more)
    for one in texts:
        server.read(one)
    server.close()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", list(MODELS))
def test_after_a_restart_answers_equal_those_of_a_fresh_prefill(family, tier, root, tmp_path, monkeypatch):
    checkpoints_every(monkeypatch, 48)
    model, settings, trunk = MODELS[family](), config(tier, tmp_path / "slow"), text(400)
    server = opened(model, root, settings)
    server.ask(trunk)
    server.close()
    assert server.used == 0
    for where, cut in CUTS.items():
        server = opened(model, root, settings)
        again = branch(trunk, cut, 430, seed=cut)
        tokens, logits = server.ask(again)
        least = cut - (48 if family == "hybrid" else 0)
        assert least <= server.reused[-1] <= cut or (family == "hybrid" and where == "near the start")
        expected, right = fresh(model, settings, again)
        assert tokens == expected, where
        torch.testing.assert_close(logits, right, rtol=1e-3, atol=1e-3)
        server.close()
        assert server.used == 0
    assert all(path.suffix != ".rows" for path in (tmp_path / "slow").glob("**/*")), "scratch files are left"


def test_a_prompt_is_written_while_it_is_answered(model, root):
    server = opened(model, root)
    trunk = text(400)
    running = server.begin(trunk)
    server.store._disk._writer.close(60)
    assert len(stored(root)) == 1
    assert server.go_on(running, trunk)[0] == fresh(model, config(), trunk)[0]
    server.end(running)
    server.close()


def test_a_prefix_that_is_in_use_can_be_removed(model, root, tmp_path):
    settings, trunk = config("disk", tmp_path / "slow"), text(400)
    write(model, root, trunk, settings=settings)
    server = opened(model, root, settings)
    again = branch(trunk, 350, 400, seed=1)
    running = server.begin(again)
    folder = server.store._disk._folder
    size = folder.nbytes
    folder.remove(folder.saved[0])
    assert folder.nbytes > size / 2  # the system keeps what is open
    assert server.go_on(running, again)[0] == fresh(model, settings, again)[0]
    assert server.store.match("", text(400)) > 0  # the running request itself
    server.end(running)
    server.store.make_room(1 << 40, 1 << 40)
    server.close()


def test_a_short_prompt_is_not_written(model, root):
    write(model, root, text(255))
    assert stored(root) == []


def test_what_the_disk_has_is_not_written_again(model, root):
    trunk = text(400)
    write(model, root, trunk, *(branch(trunk, 400, 400 + 20 * n, seed=n) for n in (1, 2, 3)))
    assert len(stored(root)) == 1


def test_a_conversation_links_to_its_earlier_rows_and_replaces_them(model, root, monkeypatch):
    monkeypatch.setattr(prefix_files, "MOST_SEGMENTS", 3)
    server, turn, linked = opened(model, root), text(400), set()
    for number in range(5):
        server.ask(turn)
        written(server)
        linked |= {len(set(row_files(folder))) for folder in stored(root)}
        if number < 4:
            turn = branch(turn, len(turn), len(turn) + 300, seed=number + 1)
    server.close()
    assert linked == {3, 6, 9}  # three layers of one to three files each: then they are copied into one
    (folder,) = stored(root)
    again = opened(model, root)
    assert again.store.status().disk_bytes == sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    assert again.ask(turn)[0] == fresh(model, config(), turn)[0]
    assert again.reused == [len(turn) - 1]
    again.close()


def test_branches_share_their_rows_on_the_disk(model, root):
    trunk = text(640)
    write(model, root, trunk)
    one = opened(model, root)
    alone = one.store.status().disk_bytes
    one.close()
    write(model, root, branch(trunk, 600, 900, seed=1), branch(trunk, 600, 900, seed=2))
    both = opened(model, root)
    status = both.store.status()
    assert status.saved == 3
    assert status.disk_bytes < 2.6 * alone  # and not 1 + 1.4 + 1.4
    assert any(path.stat().st_nlink == 3 for path in root.glob("*/*.rows"))
    both.store._disk._folder.remove(both.store._disk._folder.saved[0])
    third = branch(trunk, 560, 700, seed=3)
    assert both.ask(third)[0] == fresh(model, config(), third)[0]
    assert both.reused == [560]
    both.close()


def test_an_evicted_prefix_is_written_first(model, root, monkeypatch):
    monkeypatch.setattr(prefix_writer, "MOST_WAITING", 0)  # nothing is written in the background
    server, trunk = opened(model, root), text(400)
    server.read(trunk)
    assert server.store.status().waiting_writes == 0
    assert server.store.make_room(server.used, 0)
    assert server.used == 0
    assert server.store.status().saved == 1
    assert server.store.match("", trunk) == 399
    assert server.ask(trunk)[0] == fresh(model, config(), trunk)[0]
    assert server.store.status().counters.brought_back == 1
    server.close()


def test_closing_writes_what_is_not_there_yet(model, root, monkeypatch):
    monkeypatch.setattr(prefix_writer, "MOST_WAITING", 0)
    write(model, root, text(400), text(400, 1))
    assert len(stored(root)) == 2


def test_closing_in_a_hurry_leaves_nothing_unfinished(model, root, monkeypatch):
    monkeypatch.setattr(prefix_writer, "MOST_WAITING", 0)
    server = opened(model, root)
    for seed in range(3):
        server.read(text(400, seed))
    server.store.close(0)
    server.base.close()
    assert not list(root.glob(f"{_UNFINISHED}*"))
    assert server.used == 0


class TestLimit:
    """All prefixes together stay below a number of bytes."""

    @pytest.fixture
    def size(self, model: Any, tmp_path: Path) -> int:
        """The bytes of one prefix of 400 tokens."""
        write(model, tmp_path / "one", text(400))
        return sum(path.stat().st_blocks * 512 for path in stored(tmp_path / "one")[0].iterdir())

    def test_the_least_recently_used_go(self, model, root, size):
        texts = [text(400, seed) for seed in range(5)]
        for number, one in enumerate(texts):
            server = opened(model, root, most_disk_bytes=int(3.5 * size))
            server.read(one)
            if number:
                server.read(texts[0])  # always used again
            server.close()
            assert sum(path.stat().st_blocks * 512 for path in root.glob("*/*")) <= 3.5 * size
        server = opened(model, root)
        assert [server.store.match("", one) > 0 for one in texts] == [True, False, False, True, True]
        server.close()

    def test_a_smaller_limit_holds_from_the_start(self, model, root, size):
        write(model, root, *(text(400, seed) for seed in range(3)))
        server = opened(model, root, most_disk_bytes=int(1.5 * size))
        assert server.store.status().saved == 1
        assert server.store.status().disk_bytes <= 1.5 * size
        assert server.store.match("", text(400, 2)) == 399
        server.close()

    def test_what_can_never_fit_is_said_and_nothing_else_goes(self, model, root, size):
        write(model, root, text(400))
        server = opened(model, root, most_disk_bytes=int(1.9 * size))
        with pytest.warns(RuntimeWarning, match="--prefix-bytes"):
            server.read(text(1500, 1))
            server.close()
        assert "--prefix-bytes" in server.store.status().problem
        assert len(stored(root)) == 1

    def test_prefixes_of_another_model_count_and_go(self, model, root, size):
        write(llama(seed=1), root, text(400))
        server = opened(model, root, most_disk_bytes=int(1.9 * size))
        (problem,) = server.store.status().ignored.values()
        assert "another model" in problem
        assert server.store.match("", text(400)) == 0
        server.read(text(400))
        server.close()
        server = opened(model, root)
        assert server.store.status().ignored == {}
        assert server.store.match("", text(400)) == 399
        server.close()


def test_other_settings_of_the_low_bit_copy_are_not_mixed(model, root):
    write(model, root, text(400))
    server = opened(model, root, config(bits=4))
    assert "other settings" in next(iter(server.store.status().ignored.values()))
    assert server.ask(text(400))[0] == fresh(model, config(bits=4), text(400))[0]
    assert server.reused == [0]
    server.close()
    server = opened(model, root)
    assert server.store.status().saved == 1
    server.close()


@pytest.mark.parametrize("tier", ["ram-inplace", "disk"])
@pytest.mark.parametrize("kind", ["pages", "tail", "rows", "tokens", "session.json"])
def test_a_flipped_bit_is_noticed_and_the_prompt_read_anew(model, root, kind, tier, tmp_path):
    trunk, settings = text(400), config(tier, tmp_path / "slow")
    write(model, root, trunk, settings=settings)
    (folder,) = stored(root)
    for path in [path for path in folder.iterdir() if kind in path.name and not path.name.endswith("copy")]:
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
    server = opened(model, root, settings)
    if kind not in ("tokens", "session.json"):  # these are read at the start
        assert server.store.match("", trunk) == 399
        with server.base.fork() as cache, pytest.warns(RuntimeWarning, match="read again"):
            assert server.store.take("", trunk, cache) is None
    assert list(server.store.status().ignored) == [folder.name]
    assert server.store.match("", trunk) == 0
    tokens = server.ask(trunk)[0]
    assert tokens == fresh(model, settings, trunk)[0]
    server.close()
    server = opened(model, root, settings)
    assert server.store.status().ignored == {}  # it was written anew in the place of the damaged one
    assert server.ask(trunk)[0] == tokens
    assert server.reused == [399]
    server.close()


def test_a_missing_file_is_noticed_at_the_start(model, root):
    write(model, root, text(400))
    next(stored(root)[0].glob("*.rows")).unlink()
    server = opened(model, root)
    assert server.store.match("", text(400)) == 0
    assert len(server.store.status().ignored) == 1
    server.close()


def test_owners_are_kept_apart_on_the_disk_too(model, root):
    server = opened(model, root)
    server.read(text(400), "alice")
    server.close()
    assert "alice" not in "".join(path.name for path in root.glob("**/*"))
    assert stored(root)[0].name.startswith(owner_digest("alice"))
    server = opened(model, root)
    assert server.store.match("bob", text(400)) == 0
    assert server.store.match("alice", text(400)) == 399
    server.close()


def test_everything_is_private(model, root):
    before = os.umask(0)
    try:
        write(model, root, text(400))
    finally:
        os.umask(before)
    for path in (root, *root.glob("**/*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_second_server_on_the_folder_goes_without(model, root):
    first = opened(model, root)
    first.read(text(400))
    with pytest.warns(RuntimeWarning, match="in use by process"):
        second = opened(model, root)
    problem = second.store.status().problem
    assert "memory only" in problem and problem.endswith("Processes at the same time need a folder each.")
    assert "session" not in problem.replace(str(root), "")
    assert second.ask(text(400))[0] == fresh(model, config(), text(400))[0]
    second.close()
    first.close()
    third = opened(model, root)
    assert third.store.match("", text(400)) == 399
    third.close()


def test_foreign_files_in_the_folder_stay(model, root):
    (root / "mine").mkdir(parents=True)
    (root / "notes.txt").write_text("mine")
    with pytest.warns(RuntimeWarning, match="--prefix-bytes"):
        write(model, root, text(400), most_disk_bytes=1)
    assert (root / "notes.txt").read_text() == "mine"
    assert (root / "mine").is_dir()


def test_a_full_disk_costs_nothing_but_the_prefix(model, root, monkeypatch):
    server = opened(model, root)
    writer, closing = server.store._disk._writer, threading.Event()
    close = writer.close

    def closes(seconds: float) -> None:
        closing.set()
        close(seconds)

    def full(*_: Any) -> None:
        assert closing.wait(PATIENCE)  # what fails before is tried again
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "close", closes)
    monkeypatch.setattr(prefix_files, "write_state", full)
    server.read(text(400))
    with pytest.warns(RuntimeWarning, match="No space left"):
        server.close()
    assert server.store.status().counters.failed_writes == 1
    assert stored(root) == []
    assert not list(root.glob(f"{_UNFINISHED}*"))
    assert server.used == 0


def test_policy_full_has_nothing_to_write(model, root):
    with pytest.raises(ConfigError, match="full"):
        PrefixStore(model, config(policy="full"), folder=root)


def test_a_cache_of_policy_full_takes_rows_from_memory(model):
    settings = config()
    server = Server(model, settings, PrefixStore(model, settings))
    server.read(text(300))
    cache = server.base.fork(policy="full")
    sequence = server.store.take("", text(300), cache)
    assert sequence is not None
    cache.sequences = [sequence]
    assert answer(model, cache, text(300))[0] == fresh(model, config(policy="full"), text(300))[0]
    cache.close()
    server.close()
