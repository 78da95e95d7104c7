"""kill -9 at any moment leaves whole prefixes in the folder, or nothing that is visible.

`SPECACHE_KILLS=20` kills more often.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from specache.engine.prefix_return import to_the_end
from specache.engine.prefix_store import PrefixStore
from specache.sessions.names import _UNFINISHED
from specache.sessions.prefix_files import is_prefix_name
from tests.engine.prefixes import Server, branch, config, fresh, text
from tests.tiny import llama

KILLS = int(os.environ.get("SPECACHE_KILLS", "2"))
TURNS = 5
LENGTH = 300


def conversation(seed: int) -> list[list[int]]:
    """Prompts of one conversation, each of which begins with the one before."""
    turns = [text(LENGTH, seed)]
    for turn in range(1, TURNS):
        turns.append(branch(turns[-1], len(turns[-1]), len(turns[-1]) + LENGTH, seed=100 * seed + turn))
    return turns


def serve(root: Path, model: Any) -> None:
    """Read conversations forever, below a limit that makes older ones go."""
    server = Server(model, config(), PrefixStore(model, config(), folder=root, most_disk_bytes=8_000_000), strict=False)
    seed = 0
    while True:
        for turn in conversation(seed % 7):
            server.read(turn)
        seed += 1


def begins_to_write(root: Path) -> bool:
    """Return whether there is an unfinished prefix with rows."""
    with suppress(FileNotFoundError):  # it was finished meanwhile
        return any(root.glob(f"{_UNFINISHED}*/*.rows"))
    return False


def killed(root: Path, model: Any, delay: float) -> None:
    """Run `serve` in a process that is killed after `delay` seconds."""
    child = os.fork()
    if child == 0:
        try:
            serve(root, model)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    while not begins_to_write(root):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended by itself"


def test_a_kill_while_prefixes_are_written(tmp_path):
    model, chance = llama(), random.Random(os.getpid())
    texts = [turn for seed in range(7) for turn in conversation(seed)]
    for kill in range(KILLS):
        root = tmp_path / "prefixes"
        killed(root, model, chance.uniform(0.0, 0.3 + 0.1 * kill))
        server = Server(model, config(), PrefixStore(model, config(), folder=root))
        folder = server.store._disk._folder
        assert server.store.status().ignored == {}
        assert not list(root.glob(f"{_UNFINISHED}*"))
        assert len(folder.saved) == sum(is_prefix_name(path.name) for path in root.iterdir())
        for saved in list(folder.saved):
            assert saved.text.tolist() in texts
            with server.base.fork() as cache:
                cache.sequences = [cache.new_sequence()]
                assert to_the_end(folder.pieces(saved, cache.sequences[0], len(saved.text)))
        if folder.saved:
            ids = [*folder.saved[-1].text.tolist(), 5, 6, 7]
            assert server.ask(ids)[0] == fresh(model, config(), ids)[0]
            assert server.reused == [len(ids) - 3]
        server.close()
