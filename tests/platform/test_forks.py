"""A forked process waits for no lock that a thread of its parent held."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import specache
from specache.platform import forks

SECONDS = 120


def forked(inside: Callable[[], None]) -> int:
    """Return the exit code of a forked process: 0 if this returned there, negative if it hung."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            inside()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("make", "reentrant"), [(forks.lock, False), (forks.reentrant_lock, True)])
def test_a_lock_that_another_thread_holds_is_free_in_a_forked_process(make, reentrant):
    lock, held, over = make(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def inside() -> None:
        with lock:
            assert lock.acquire(blocking=False) == reentrant

    try:
        assert forked(inside) == 0
        assert not lock.acquire(blocking=False)  # and the parent's is held as before
    finally:
        over.set()
        thread.join()
    assert lock.acquire(blocking=False)


def test_a_thread_that_forks_goes_on_holding_a_reentrant_lock():
    lock = forks.reentrant_lock()

    def inside() -> None:
        lock.release()
        assert lock.acquire(blocking=False)

    with lock:
        assert forked(inside) == 0


def test_locks_are_forgotten_with_their_owners():
    made = [forks.lock(), forks.reentrant_lock()]
    assert all(lock in forks._locks for lock in made)
    left = [weakref.ref(lock) for lock in made]
    del made
    assert not any(reference() for reference in left)


def test_a_forked_process_generates_while_every_lock_was_held(tmp_path):
    """And it frees what its parent had."""
    script = f"""
import os, signal, sys, threading, torch
torch.set_num_threads(1)
import specache
from specache.platform import forks
from tests.tiny import llama, prompt
greedy = dict(max_new_tokens=4, do_sample=False)
model, ids = llama(), prompt(300)
tiers = "ram", "disk:{tmp_path}"
configs = [specache.SpeCacheConfig(slow_tier=tier) for tier in tiers]
caches = [specache.SpeCache(model, config) for config in configs]
expected = [specache.generate(model, ids, past_key_values=cache, **greedy) for cache in caches]
held, over = threading.Event(), threading.Event()
def hold():
    locks = list(forks._locks)
    assert len(locks) > 15, len(locks)
    for lock in locks:
        lock.acquire()
    held.set()
    over.wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    code = 1
    try:
        signal.alarm({SECONDS})
        for config, tokens in zip(configs, expected):
            with specache.SpeCache(model, config) as cache:
                assert specache.generate(model, ids, past_key_values=cache, **greedy).equal(tokens)
        for cache in caches:
            cache.close()
        caches.clear()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["."]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=4 * SECONDS, env=environment)
    assert done.returncode == 0, done.stderr


def test_locks_of_the_library_are_free_in_forked_processes():
    """Only what belongs to a service or a command, which no forked process can use, has others."""
    root = Path(specache.__file__).parent
    lock = re.compile(r"threading\.(R?Lock|Condition|Semaphore)\(")
    named = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if lock.search(path.read_text())}
    allowed = {"platform/forks.py", "engine/service.py", "engine/prefix_writer.py"}
    assert {name for name in named if not name.startswith("server/")} <= allowed
