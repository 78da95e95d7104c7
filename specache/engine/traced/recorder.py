"""Record what a layer's forward computes, while it runs.

PyTorch hands every operation to a dispatch mode, after autograd and with real tensors. Tensors are
known by their memory: it is a weight's, an argument's, or was made by an operation before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specache.engine.traced.layer_operations import ALLOCATIONS, VIEWS, Operand, Operation, Unrecordable, translate
from specache.platform import extension, private_torch

_DispatchMode: Any = private_torch.dispatch_mode() or object
CODES = (torch.int8, torch.uint8, torch.int16)  # of packed weights


@dataclass
class Buffer:
    """The memory of one or more tensors.

    Attributes:
        given: whether no operation made it: an argument, a weight, the attention's result.
        bytes: its size.
        first, last: the operations that use it.
    """

    given: bool
    bytes: int
    first: int = -1
    last: int = -1


class Recorder(_DispatchMode):
    """Records the operations of the code that runs inside.

    Attributes:
        operations: in their order.
        buffers: those given first, in the order in which they were.
        reason: why the code cannot be recorded, or `None` so far.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.buffers: list[Buffer] = []
        self.reason: str | None = None
        self._paused = False
        self._known: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no other tensor gets their memory
        for tensor in given:
            self.give(tensor)

    def give(self, tensor: Tensor) -> int:
        """Make a tensor known that no recorded operation made, and return its buffer."""
        return self._add(tensor, given=True)

    def place(self, tensor: Any) -> Operand:
        """Return where a tensor lies.

        Raises:
            Unrecordable: it is not known, or a program cannot read it.
        """
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu
        if not (plain and (tensor.dtype in extension.DTYPES or tensor.dtype in CODES)):
            raise Unrecordable("a tensor of another kind")
        buffer = self._known.get(tensor.untyped_storage().data_ptr())
        if buffer is None or tensor.numel() == 0:
            raise Unrecordable("a tensor that was not made by the layer")
        size = tensor.itemsize
        strides = tuple(stride * size for stride in tensor.stride())
        return Operand(buffer, tensor.dtype, tensor.storage_offset() * size, tuple(tensor.shape), strides)

    def pause(self) -> None:
        """Record nothing until `go_on`."""
        self._paused = True

    def go_on(self) -> None:
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode operations come whole that are several others: `to`, `reshape`
            out = func.decompose(*args, **kwargs) if hasattr(func, "decompose") else NotImplemented
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        if not self._paused and self.reason is None:
            try:
                self._note(str(func), args, kwargs, out)
            except Unrecordable as error:
                self.reason = str(error)
        return out

    def _note(self, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        made = [each for each in (out if isinstance(out, tuple | list) else (out,)) if isinstance(each, Tensor)]
        self._kept += made
        if name in VIEWS:
            for each in made:
                if each.numel():
                    self.place(each)
            return
        if name.split(".")[1].endswith("_"):  # in place
            if self.buffers[self.place(out).buffer].given:
                raise Unrecordable(f"{name} changes what the layer was given")
        elif isinstance(out, Tensor):
            self._add(out, given=False)
        elif made:  # of several results only the first is known
            self._add(made[0], given=False)
        if name in ALLOCATIONS:
            return
        for operation in translate(name, args, kwargs, out, self.place):
            index = len(self.operations)
            self.operations.append(operation)
            for operand in operation.operands:
                buffer = self.buffers[operand.buffer]
                buffer.first, buffer.last = index if buffer.first < 0 else buffer.first, index

    def _add(self, tensor: Tensor, given: bool) -> int:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._known:
            self._known[address] = len(self.buffers)
            self.buffers.append(Buffer(given, storage.nbytes()))
        elif not given:
            raise Unrecordable("an operation that returns its argument")
        self._kept.append(tensor)
        return self._known[address]
