"""The hot set of one layer of a batch in device memory: the host never reads what it contains.

Every operation is a fixed sequence of kernels on fixed shapes and static buffers, so that it can be
queued and captured in a CUDA graph. These are PyTorch's operations; `fused_rows` has kernels that
do a step's part in one launch each. The buffers have two extra slots, for positions that are not
cached and for rows that find no free slot. The table has two extra positions, for "no pair" and for
slots without an owner.

Positions are int64 [B, Hkv, k], each once, -1 where there is no pair. Slots are int64 of the same
shape, `C` and above for none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.platform.budget import ByteBudget
from specache.rows.hot_set import least_recently_used

INDEX_BYTES = 4  # int32: a slot's position and tick of last use, a position's slot, the current tick
OLDEST = (1 << 16) - 1  # ticks: slots not used for as long, or never, are equally old


def hot_set_bytes(batch: int, heads: int, slots: int, tokens: int, row_bytes: int) -> int:
    """Return the device memory of a `DeviceHotSet` with rows of `row_bytes`, in bytes."""
    return batch * heads * ((slots + 2) * (row_bytes + 2 * INDEX_BYTES) + (tokens + 2) * INDEX_BYTES + INDEX_BYTES)


class DeviceHotSet:
    """An LRU cache with `C` slots per sequence and KV head; of equally old slots the first goes.

    It has the same hits and victims as `specache.rows.hot_set.HotSet` with as many slots has for
    one sequence, as long as no slot is `OLDEST` ticks old. New rows get the victims in ascending
    order.

    Args:
        slots: `C`, at least the number of positions in a lookup.
        tokens: `T`; all positions are below it.
        width: elements of a row (`2 D`).
        budget: fast memory for the buffers.

    Attributes:
        kv_rows: [B, Hkv, C + 2, 2 D]. Slot `C` (`absent`) is always zero; slot `C + 1` (`refused`)
            takes rows without a slot.
        table: int32 [B, Hkv, T + 2], position -> slot. Position `T` stands for no pair; position `T
            + 1` owns the slots without an owner.
        owner: int32 [B, Hkv, C + 2], slot -> position.
        used: int32 [B, Hkv, C + 2], the tick in which a slot was last used.
        tick: int32 [B, Hkv, 1], equal everywhere: each program of a kernel counts its own. Slots
            used in the current tick are not evicted.

    Raises:
        FastMemoryError: the budget does not allow it.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        slots: int,
        tokens: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        budget: ByteBudget | None = None,
    ) -> None:
        size = hot_set_bytes(batch, num_kv_heads, slots, tokens, width * dtype.itemsize)
        self._claim = (budget or ByteBudget()).claim(size, "hot sets")
        self.capacity, self.tokens, self.width = slots, tokens, width
        self.absent, self.refused = slots, slots + 1
        shape, stride = (batch, num_kv_heads), slots + 2
        self.kv_rows = torch.zeros(*shape, stride, width, dtype=dtype, device=device)
        self.table = torch.empty(*shape, tokens + 2, dtype=torch.int32, device=device)
        self.owner = torch.empty(*shape, stride, dtype=torch.int32, device=device)
        self.used = torch.empty(*shape, stride, dtype=torch.int32, device=device)
        self.tick = torch.zeros(*shape, 1, dtype=torch.int32, device=device)
        self._refused, self._unowned = (torch.tensor(x, device=device) for x in (self.refused, tokens + 1))
        self._first_row = torch.arange(batch * num_kv_heads, device=device).view(*shape, 1) * stride
        self.clear()

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return self._claim.size

    @property
    def written_to(self) -> tuple[Tensor, ...]:
        """The buffers that `put` uses, which may run on another queue than the rest."""
        return self.kv_rows, self._first_row

    def advance(self) -> None:
        """Begin the next tick."""
        self.tick.add_(1)

    def look_up(self, positions: Tensor) -> Tensor:
        """Return the slots of the positions, `absent` if not cached. Mark them as used."""
        slots = self.table.gather(-1, positions.masked_fill(positions < 0, self.tokens)).long()
        self._touch(slots)
        return slots

    def claim(self, positions: Tensor, missing: Tensor) -> Tensor:
        """Claim slots for the positions that are `missing` (bool [B, Hkv, k]).

        The least recently used slots are evicted, but none that was used in this tick. A position
        that gets no slot, or is not missing, gets `refused`. Lookups find the positions from now
        on; the caller must `put` their rows before anything reads them.
        """
        age = (self.tick - self.used[..., : self.capacity]).clamp_(max=OLDEST)
        slots = least_recently_used(age, missing, self._refused)
        granted = slots != self._refused
        self._give(slots, torch.where(granted, positions, self._unowned))
        self._touch(slots)
        return slots

    def forget(self, positions: Tensor, slots: Tensor) -> None:
        """Empty those of the `slots`, from `claim`, that still belong to these positions."""
        owned = (slots < self.capacity) & (self.owner.gather(-1, slots) == positions)
        slots = torch.where(owned, slots, self._refused)
        self._give(slots, self._unowned.expand_as(slots))
        self.used.scatter_(-1, slots, self._long_ago().expand_as(slots))

    def put(self, slots: Tensor, kv_rows: Tensor) -> None:
        """Write rows [B, Hkv, k, 2 D] into slots from `claim`."""
        self._flat().index_copy_(0, (slots + self._first_row).flatten(), kv_rows.reshape(-1, self.width))

    def get(self, slots: Tensor, out: Tensor) -> None:
        """Read slots from `look_up` into contiguous `out` [B, Hkv, k, 2 D], zeros if `absent`."""
        torch.index_select(self._flat(), 0, (slots + self._first_row).flatten(), out=out.view(-1, self.width))

    def clear(self) -> None:
        """Empty all slots."""
        self.table.fill_(self.absent)
        self.owner.fill_(self.tokens + 1)
        self.used.copy_(self._long_ago().expand_as(self.used))

    def _long_ago(self) -> Tensor:
        """Return the tick of last use of empty slots."""
        return self.tick - OLDEST

    def _give(self, slots: Tensor, positions: Tensor) -> None:
        """Assign slots to these positions. Their previous positions become absent."""
        self.table.scatter_(-1, self.owner.gather(-1, slots).long(), self.absent)
        self.table.scatter_(-1, positions, slots.int())
        self.owner.scatter_(-1, slots, positions.int())

    def _touch(self, slots: Tensor) -> None:
        self.used.scatter_(-1, slots, self.tick.expand_as(slots))

    def _flat(self) -> Tensor:
        return self.kv_rows.view(-1, self.width)
