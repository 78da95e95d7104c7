"""Modes of PyTorch that a caller may have set on its thread, and which part of a call sees them.

What a cache keeps must not depend on the mode of the call that made it: a tensor made in inference mode cannot be
changed outside of it, and a product under autocast is rounded to 16 bits. So the calls of this package run as PyTorch
starts (`ours`), and whatever is the caller's own in them runs in the caller's modes (`callers`), as it would in stock
`generate`: the model, logits processors, streamers. The default dtype belongs to the whole process, other threads
included, so it is never changed here: every allocation of this package names its dtype.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from specache.errors import UsageError

DEVICES_WITH_AUTOCAST = ("cpu", "cuda")


@dataclass(frozen=True)
class Modes:
    """What was set on a thread. Gradients are left out: they are off in every call, as in stock `generate`.

    Attributes:
        inference: `torch.inference_mode`.
        autocast: (device, dtype, whether casts of weights are kept) of each `torch.autocast` that is on.
        device: the default device where it is not the CPU, else `None`.
    """

    inference: bool = False
    autocast: tuple[tuple[str, torch.dtype, bool], ...] = ()
    device: torch.device | None = None


PLAIN = Modes()


class _Thread(threading.local):
    """Of one thread.

    Attributes:
        callers: what each call of ours that is under way on it found.
        away: inside `callers`, with modes that are not plain.
    """

    def __init__(self) -> None:
        self.callers: list[Modes] = []
        self.away = False


_thread = _Thread()
_ran_here = False  # whether this process, or the one that it was forked from, ran something of ours
_forked_after_running = False


@contextmanager
def ours() -> Iterator[None]:
    """Inside, PyTorch is as it starts: no inference mode, no gradients, no autocast, the CPU as default device."""
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
    """Inside, which is inside of `ours`, the modes are the caller's again, without gradients."""
    found = _thread.callers[-1] if _thread.callers else PLAIN
    return nullcontext() if found == PLAIN else _restored(found)


def ours_again() -> AbstractContextManager[None]:
    """`ours` for what the model calls back, where the model runs in modes that are not plain."""
    return ours() if _thread.away else nullcontext()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What `torch.autocast`, which may be on, makes of a tensor that goes into a product; `None` where it stays as it is."""
    device = tensor.device.type
    if not (torch.is_autocast_enabled(device) and tensor.is_floating_point()) or tensor.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def caller_autocasts(device: torch.device) -> bool:
    """Inside of `ours`: whether the caller has autocast on for a device."""
    return bool(_thread.callers) and any(kind == device.type for kind, _, _ in _thread.callers[-1].autocast)


def check_process() -> None:
    """Refuse to run a model in a process that was forked after it had run one, where PyTorch's threads are gone.

    Raises:
        UsageError: this is one, and PyTorch would wait for the threads.
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


def _after_fork() -> None:
    global _forked_after_running
    _forked_after_running = _ran_here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
