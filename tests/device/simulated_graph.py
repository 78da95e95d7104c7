"""CUDA graphs without a GPU: what a capture launched is launched again, with the arguments that it
had then.

While it captures, every PyTorch operation is recorded with its tensors and numbers, and so is every
launch of a Triton kernel in its interpreter. As on CUDA, a capture runs nothing: whatever memory it
changed is put back, and what it made holds garbage until the first replay. A replay runs the same
operations on the same tensors. So a length or a position that the host has put into a launch stays
what it was, and shows as wrong tokens; reading from the device, and copying from the host, fail as
they do in a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from specache.kernels import triton as triton_kernels

_WAIT_FOR_THE_DEVICE = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh")
_INDEXING = ("index", "index_put_", "index_put")  # with a mask they count its true elements first
GARBAGE = -(2**40)


class NotPermitted(RuntimeError):
    """What CUDA says of an operation that a capture cannot hold."""


@dataclass
class _Launch:
    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]  # new memory that it filled

    def again(self) -> None:
        made = _tensors(self.operation(*self.args, **self.kwargs))
        for recorded, new in zip(self.results, made, strict=True) if self.results else ():
            recorded.copy_(new)


@dataclass
class _KernelLaunch:
    run: Callable[..., None]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]  # none: a kernel writes into what it is given

    def again(self) -> None:
        self.run(*self.args, **self.kwargs)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: list[_Launch | _KernelLaunch] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # by address: storage, its old bytes

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation._schema.name.partition("::")[2]
        if name in _WAIT_FOR_THE_DEVICE or (name in _INDEXING and _has_mask(args[1])):
            raise NotPermitted(f"operation not permitted when stream is capturing: {name}")
        for tensor in _written(operation, args, kwargs):
            self._keep(tensor)
        result = operation(*args, **kwargs)
        is_alias = any(returned.alias_info is not None for returned in operation._schema.returns)
        changes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in operation._schema.arguments)
        if changes or not is_alias:
            self.launches.append(_Launch(operation, args, kwargs, [] if is_alias else _tensors(result)))
        return result

    def kernel(self, run: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A launch, any argument of which may be written. What the interpreter does is no launch of
        its own.
        """
        with _disable_current_modes():
            for tensor in _tensors((args, kwargs)):
                self._keep(tensor)
            run(*args, **kwargs)
        self.launches.append(_KernelLaunch(run, args, kwargs, []))

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._before:
            self._before[storage.data_ptr()] = storage, storage.clone()

    def put_back(self) -> None:
        """Nothing has run."""
        for storage, old in self._before.values():
            storage.copy_(old)
        for result in (result for launch in self.launches for result in launch.results):
            result.fill_(torch.nan if result.is_floating_point() else GARBAGE if result.dtype == torch.int64 else 0)


class SimulatedGraphs:
    """Captures on the CPU.

    Attributes:
        captures: how many there were.
        replays: how many of all of them.
    """

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recorder = _Recorder()
        try:
            with recorder, _kernels_recorded(recorder):
                result = run()
        finally:
            recorder.put_back()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for launch in recorder.launches:
                launch.again()

        return replay, result


@contextmanager
def _kernels_recorded(recorder: _Recorder) -> Iterator[None]:
    """Launches of Triton kernels are recorded, where Triton is there and interprets."""
    if not triton_kernels.interpreted():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    launch = InterpretedFunction.run

    def recorded(kernel: Any, *args: Any, **kwargs: Any) -> None:
        recorder.kernel(lambda *a, **k: launch(kernel, *a, **k), args, kwargs)

    InterpretedFunction.run = recorded
    try:
        yield
    finally:
        InterpretedFunction.run = launch


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _written(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operation changes."""
    for place, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)
