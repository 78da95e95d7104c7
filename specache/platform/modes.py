"""Isolate the package from PyTorch modes that the caller has set on its thread.

A cache must not depend on the mode of the call that made it: a tensor made in inference mode cannot
be changed outside of it, and a product under autocast is rounded to 16 bits. So this package runs
in PyTorch's initial modes (`ours`), and the caller's code inside it (model, logits processors,
streamers) runs in the caller's modes (`callers`), as in stock `generate`. The default dtype belongs
to the whole process, so it is never changed: every allocation of this package names its dtype.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from specache.errors import UsageError
from specache.platform.forks import in_child

DEVICES_WITH_AUTOCAST = ("cpu", "cuda")


@dataclass(frozen=True)
class Modes:
    """The modes of a thread.

    Gradients are omitted: they are off in every call, as in stock `generate`.

    Attributes:
        inference: `torch.inference_mode`.
        autocast: (device, dtype, cache enabled) of each active `torch.autocast`.
        device: the default device if it is not the CPU, else None.
    """

    inference: bool = False
    autocast: tuple[tuple[str, torch.dtype, bool], ...] = ()
    device: torch.device | None = None


PLAIN = Modes()


class _Thread(threading.local):
    """State of one thread.

    Attributes:
        callers: the caller's modes of each call in progress.
        away: True inside `callers` with modes that are not the initial ones.
    """

    def __init__(self) -> None:
        self.callers: list[Modes] = []
        self.away = False


_thread = _Thread()
_ran_here = False  # True once this process, or the one it was forked from, ran a model
_forked_after_running = False


@contextmanager
def ours() -> Iterator[None]:
    """Run the block in PyTorch's initial modes: no inference mode, gradients or autocast, and the
    CPU as default device.
    """
    found = _current()
    away, _thread.away = _thread.away, False
    _thread.callers.append(found)
    try:
        with ExitStack() as stack:
            if found.inference:
                stack.enter_context(torch.inference_mode(False))
            for device, _, _ in found.autocast:
                stack.enter_context(torch.autocast(device, enabled=False))
            if found.device is not None:
                stack.enter_context(torch.device("cpu"))
            stack.enter_context(torch.no_grad())  # last: leaving inference mode turns gradients on
            yield
    finally:
        _thread.callers.pop()
        _thread.away = away


def callers() -> AbstractContextManager[None]:
    """Run the block, inside `ours`, in the caller's modes, without gradients."""
    found = of_caller()
    return nullcontext() if found == PLAIN else _restored(found)


def of_caller() -> Modes:
    """Return the caller's modes, inside `ours`."""
    return _thread.callers[-1] if _thread.callers else PLAIN


def ours_again() -> AbstractContextManager[None] | None:
    """Return `ours` for code that the model calls back, `None` if the model runs in our modes."""
    return ours() if _thread.away else None


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype to which `torch.autocast` casts an operand of a product.

    Return None if it does not.
    """
    device = "cpu" if tensor.is_cpu else tensor.device.type  # the first is several times as fast
    if not (torch.is_autocast_enabled(device) and tensor.is_floating_point()) or tensor.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def check_process() -> None:
    """Refuse to run a model in a process forked after one had run, because PyTorch's threads do not
    exist there.

    Raises:
        UsageError: this is such a process, and PyTorch would wait for the threads.
    """
    global _ran_here
    if _forked_after_running and torch.get_num_threads() > 1:
        raise UsageError(
            "This process was forked from one in which specache had run a model: PyTorch's threads stayed behind there, and "
            "the first operation that is shared between threads would wait for them for ever. Start processes with "
            "multiprocessing's 'spawn', or call torch.set_num_threads(1) in this one first."
        )
    _ran_here = True


@contextmanager
def _restored(modes: Modes) -> Iterator[None]:
    before, _thread.away = _thread.away, True
    try:
        with ExitStack() as stack:
            if modes.inference:
                stack.enter_context(torch.inference_mode(True))
            for device, dtype, keeps_casts in modes.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=keeps_casts))
            if modes.device is not None:
                stack.enter_context(modes.device)
            yield
    finally:
        _thread.away = before


def _current() -> Modes:
    autocast = tuple(
        (device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
        for device in DEVICES_WITH_AUTOCAST
        if torch.is_autocast_enabled(device)
    )
    device = torch.get_default_device()
    return Modes(torch.is_inference_mode_enabled(), autocast, None if device.type == "cpu" else device)


@in_child
def _after_fork() -> None:
    global _forked_after_running
    _forked_after_running = _ran_here
