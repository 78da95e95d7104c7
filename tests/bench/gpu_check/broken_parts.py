"""Parts that go wrong in every way, for a process of their own (`test_runner.py`)."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from specache.bench.gpu_check.checks import PartRun


def passes(part: PartRun) -> None:
    """Pass, and count how often it ran: a character each, since runs may go on at once."""
    with (part.shared / "count").open("a") as count:
        count.write("1")
    part.run("right", lambda check: check.require(True, ""))
    part.table("numbers", [{"name": "one", "value": 1.5}])
    part.fact(seen=part.options.get("facts", {}).get("seen", 0) + 1)


def fails(part: PartRun) -> None:
    """One check fails, one raises, and one that follows passes."""
    part.run("wrong numbers", lambda check: check.require(False, "2 is not 3"))
    part.run("an error", lambda check: {}["missing"])  # type: ignore[no-any-return, index]
    part.run("what follows", lambda check: None)
    part.run("not here", lambda check: check.skip("no such GPU"))


def raises(part: PartRun) -> None:
    """The part itself is wrong, outside of any check."""
    part.run("before", lambda check: None)
    raise ValueError("a mistake in the part")


def hangs(part: PartRun) -> None:
    (part.shared / "pid").write_text(str(os.getpid()))
    part.run("before", lambda check: None)
    part.run("waits for ever", lambda check: _wait_for_ever(part))


def _wait_for_ever(part: PartRun) -> None:
    (part.shared / "waits").write_text("for ever")
    time.sleep(600)


def hangs_with_a_child(part: PartRun) -> None:
    """A grandchild would go on with the GPU."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(part.shared / "grandchild").write_text(str(os.getpid()))
        time.sleep(600)
    hangs(part)


def is_killed(part: PartRun) -> None:
    part.run("takes all memory", lambda check: os.kill(os.getpid(), signal.SIGKILL))


def crashes(part: PartRun) -> None:
    part.run("reads nowhere", lambda check: os.kill(os.getpid(), signal.SIGSEGV))


def leaves(part: PartRun) -> None:
    """`exit` in the middle, as a library might call it."""
    part.run("before", lambda check: None)
    with part.check("calls exit"):
        sys.exit(0)


def leaves_hard(part: PartRun) -> None:
    with part.check("calls _exit"):
        os._exit(0)


def loses_the_gpu(part: PartRun) -> None:
    """After an illegal access every call of CUDA fails."""

    def illegal(check: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    part.run("reads past the end", illegal)
    part.run("never runs", lambda check: None)


def runs_out_of_memory(part: PartRun) -> None:
    import torch

    def out(check: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    part.run("too large", out)
    part.run("smaller", lambda check: None)


def has_no_time(part: PartRun) -> None:
    part.run("long", lambda check: check.require(False, "it ran"), needs_s=10**6)


def says(part: PartRun) -> None:
    """Writes to both outputs and warns."""
    import warnings

    def noisy(check: object) -> None:
        print("said on stdout", flush=True)
        print("said on stderr", file=sys.stderr, flush=True)
        warnings.warn("this was slower", RuntimeWarning, stacklevel=1)

    part.run("noisy", noisy)
