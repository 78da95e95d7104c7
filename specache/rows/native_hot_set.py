"""The hot set of a CPU in C++ (csrc/hot_set.hpp): the slots, victims and rows of `HotSet`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specache.kernels import dispatch
from specache.kernels.cpu import native
from specache.platform.budget import ByteBudget
from specache.rows.hot_set import HotSet, Lookup, Missing


def new_hot_set(num_kv_heads: int, row: int, dtype: torch.dtype, device: torch.device, budget: ByteBudget | None = None) -> HotSet:
    """Return an empty hot set for rows of `row` elements: in C++ if this machine can, on a CPU."""
    in_cpp = device.type == "cpu" and native.IMPORT_ERROR is None and not dispatch.forces_torch()
    return (NativeHotSet if in_cpp else HotSet)(num_kv_heads, 0, row, dtype, device, budget)


class NativeHotSet(HotSet):
    """A `HotSet` whose operations are calls of C++, which keeps an index of the positions.

    Attributes:
        native: the C++ object. It points to the memory of `kv_rows`, `position` and `stamp`.
    """

    in_slots = True

    def __init__(
        self, num_kv_heads: int, capacity: int, row: int, dtype: torch.dtype, device: torch.device, budget: ByteBudget | None = None
    ) -> None:
        self.native: Any = native.new_hot_set(num_kv_heads)
        super().__init__(num_kv_heads, capacity, row, dtype, device, budget)
        self._held: tuple[Tensor, ...] = (self.kv_rows, self.position, self.stamp)
        self._use(*self._held)

    @property
    def step(self) -> int:
        return int(self.native.step)

    @step.setter
    def step(self, step: int) -> None:
        self.native.step = step

    def find(self, positions: Tensor) -> Tensor:
        positions = positions.contiguous()
        slots = torch.empty_like(positions)
        self.native.find(positions.data_ptr(), positions.shape[1], slots.data_ptr())
        return slots

    def look_up(self, positions: Tensor, real_queries: int) -> Lookup:
        positions = positions.contiguous()
        heads, n, k = positions.shape
        found = torch.empty(2, heads, n, k, dtype=torch.int64)  # positions and slots
        lacking = torch.empty(3, heads, real_queries * k, dtype=torch.int64)
        addresses = *_addresses(found, 2), *_addresses(lacking, 3)
        selected, ready, count, fits = self.native.look_up(positions.data_ptr(), n, k, real_queries, *addresses)
        return Lookup(found[0], found[1], _missing(lacking, count), selected, ready, fits)

    def missing(self, positions: Tensor) -> Missing:
        positions = positions.contiguous()
        lacking = torch.empty(3, *positions.shape, dtype=torch.int64)
        count = self.native.missing(positions.data_ptr(), positions.shape[1], *_addresses(lacking, 3))
        return _missing(lacking, count)

    def rows_at(self, slots: Tensor) -> Tensor:
        slots = slots.contiguous()
        kv_rows = self.kv_rows.new_empty(*slots.shape, self.kv_rows.shape[-1])
        self.native.gather(slots.data_ptr(), slots.shape[1], kv_rows.data_ptr())
        return kv_rows

    def advance(self) -> None:
        self.native.keep_ahead()
        self.native.step += 1

    def forget_ahead(self) -> None:
        self.native.forget_ahead()

    def reserve(self, positions: Tensor) -> Tensor:
        positions = positions.contiguous()
        slots = torch.empty_like(positions)
        self.native.reserve(positions.data_ptr(), positions.shape[1], slots.data_ptr())
        return slots

    def fill(self, kv_rows: Tensor) -> None:
        kv_rows = kv_rows.to(self.kv_rows.dtype).contiguous()
        self.native.fill(kv_rows.data_ptr(), len(kv_rows))

    def forget(self) -> None:
        self.native.forget()

    def clear(self) -> None:
        self.native.clear()

    def free(self) -> None:
        self.native.clear()  # also what is reserved
        super().free()

    def _replace(self, kv_rows: Tensor, position: Tensor, stamp: Tensor) -> None:
        self._held = *self._held, kv_rows, position, stamp  # an interrupt leaves C++ no memory that was freed
        self._use(kv_rows, position, stamp)
        super()._replace(kv_rows, position, stamp)
        self._held = kv_rows, position, stamp

    def _use(self, kv_rows: Tensor, position: Tensor, stamp: Tensor) -> None:
        sizes = position.shape[1], kv_rows.shape[-1] * kv_rows.itemsize
        self.native.use(position.data_ptr(), stamp.data_ptr(), kv_rows.data_ptr(), *sizes)


def _missing(lacking: Tensor, count: int) -> Missing:
    """Return the missing rows of `lacking` [3, Hkv, k]: positions, heads and tokens."""
    pairs, lists = lacking.numel() // 3, lacking.view(-1)
    return Missing(lacking[0], lists[pairs : pairs + count], lists[2 * pairs : 2 * pairs + count])


def _addresses(numbers: Tensor, parts: int) -> list[int]:
    """Return the addresses of the parts of int64 numbers [parts, ...]."""
    first, size = numbers.data_ptr(), numbers.nbytes // parts
    return [first + i * size for i in range(parts)]
