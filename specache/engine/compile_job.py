"""Compile a model's decode steps in a child process, which fills the cache folder.

A child, not a thread: the compiler saves and restores the process's random state, and holds the
interpreter's lock for seconds at a time. The child gets the model without its weights' values, runs
one step of each variant over zeros, and ends. It ends with this process, too.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import MethodType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from specache.engine.compile_cache import CompileCache
from specache.engine.compiled_layers import Variant
from specache.platform.forks import in_child

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from specache.engine.compile_worker import main; main(sys.argv[2])"
)
_children: list[subprocess.Popen[bytes]] = []
_owner = os.getpid()


class CompileJob:
    """A child process that compiles variants of a model's decode step.

    Args:
        child: the process; `None` if another process is compiling the model.
    """

    def __init__(self, child: subprocess.Popen[bytes] | None, cache: CompileCache) -> None:
        self._child = child
        self._cache = cache
        self._owner = os.getpid()

    @classmethod
    def start(cls, model: Any, cache: CompileCache, variants: Iterable[Variant]) -> CompileJob:
        """Start the child, unless another process compiles the same model.

        Raises:
            Exception: the model cannot be pickled, or no process can be started.
        """
        with cache.locked() as lock:
            if lock is None:
                return cls(None, cache)
            request = cache.folder / f"request-{os.getpid()}.pickle"
            request.write_bytes(pickled(model, variants))
            child = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(request)],
                stdin=subprocess.PIPE,  # ends when this process does, and the child with it
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(lock,),
                start_new_session=True,  # a group of its own, with its compilers; no Ctrl-C
            )
        _children.append(child)
        return cls(child, cache)

    @property
    def ran(self) -> bool:
        """Return whether there is a child; not if another process has the model locked."""
        return self._child is not None

    @property
    def finished(self) -> bool:
        """Return whether the child has ended. A forked process cannot know, and says no."""
        return self._owner == os.getpid() and (self._child is None or self._child.poll() is not None)

    @property
    def failure(self) -> str | None:
        """Return why a finished child compiled nothing, or `None`."""
        if self._child is None or not self._child.returncode:
            return None
        return self._cache.failure() or f"the compiling process ended with status {self._child.returncode}"


def pickled(model: Any, variants: Iterable[Variant]) -> bytes:
    """Return the request to the child: a model whose tensors have shapes and dtypes, no values."""
    buffer = io.BytesIO()
    request = {
        "model": model,
        "variants": [(variant.tokens, variant.several) for variant in variants],
        "threads": torch.get_num_threads(),
    }
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(request)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles tensors without their values, and methods that were set on an object."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter):
                raise TypeError(f"weights of type {type(value).__name__} are not supported")
            return _blank, (tuple(value.shape), value.stride(), value.dtype, isinstance(value, nn.Parameter), value.requires_grad)
        if isinstance(value, MethodType):
            return _method, (value.__func__, value.__self__)
        return NotImplemented


def _blank(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, parameter: bool, grad: bool) -> Tensor:
    """Return a tensor of zeros whose memory the system need not provide."""
    elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if all(shape) else 0
    memory = torch.from_numpy(numpy.zeros(elements * dtype.itemsize, numpy.uint8))  # zeros are only mapped
    tensor = memory.view(dtype).as_strided(shape, stride)
    return nn.Parameter(tensor, requires_grad=grad) if parameter else tensor.requires_grad_(grad)


def _method(function: Callable[..., Any], owner: Any) -> MethodType:
    return MethodType(function, owner)


@atexit.register
def _end_children() -> None:
    """End the children and their compilers; not in forked processes."""
    if os.getpid() != _owner:
        return
    for child in _children:
        if child.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.stdin is not None:
            child.stdin.close()


@in_child
def _after_fork() -> None:
    _children.clear()
    global _owner
    _owner = os.getpid()
