"""Recently used rows of one layer of a batch, in device memory: a cache that is looked up and filled without the host knowing what
it holds.

Every operation is a fixed sequence of kernels on fixed shapes, into buffers that stay where they are, so that it can be queued and
captured in a CUDA graph. These are PyTorch's operations; `fused_rows` has kernels that do a step's part in one launch each. Buffers
have two slots more than rows are kept in, for what is not here and for what finds no room, and the table has two positions more,
for no pair and for nobody's.

Positions are int64 [B, Hkv, k], each once, -1 where there is no pair. Slots are int64 of the same shape, `C` and above for none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.platform.budget import ByteBudget

INDEX_BYTES = 4  # of a slot's position and of the tick when it was last wanted, of a position's slot, and of a tick
OLDEST = (1 << 16) - 1  # ticks: slots that were not wanted for as long, or never, are equally old


def hot_set_bytes(batch: int, heads: int, slots: int, tokens: int, row_bytes: int) -> int:
    """Device memory of a `DeviceHotSet` with rows of `row_bytes`."""
    return batch * heads * ((slots + 2) * (row_bytes + 2 * INDEX_BYTES) + (tokens + 2) * INDEX_BYTES + INDEX_BYTES)


class DeviceHotSet:
    """`C` slots per sequence and KV head, the least recently used one out first, and of equally old ones the first.

    Same hits and same victims as `specache.rows.hot_set.HotSet` has for one sequence with as many slots, as long as none of its
    slots is `OLDEST` ticks old. The victims of a step are given to its newcomers in ascending order.

    Args:
        slots: `C`, at least as many as positions are looked up at a time.
        tokens: positions are below it (`T`).
        width: elements of a row (`2 D`).
        budget: fast memory that the buffers are taken from.

    Attributes:
        rows: [B, Hkv, C + 2, 2 D]. Slot `C` (`absent`) is zero and stays so; slot `C + 1` (`refused`) takes rows that nobody wants.
        table: int32 [B, Hkv, T + 2], position -> slot. `T` stands for no pair, `T + 1` is whose slots nobody owns.
        owner: int32 [B, Hkv, C + 2], slot -> position.
        used: int32 [B, Hkv, C + 2], the tick when a slot was last wanted.
        tick: int32 [B, Hkv, 1], the same for all: each program of a kernel counts its own. What was wanted in the current tick is
            never evicted in it.

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
        self.rows = torch.zeros(*shape, stride, width, dtype=dtype, device=device)
        self.table = torch.empty(*shape, tokens + 2, dtype=torch.int32, device=device)
        self.owner = torch.empty(*shape, stride, dtype=torch.int32, device=device)
        self.used = torch.empty(*shape, stride, dtype=torch.int32, device=device)
        self.tick = torch.zeros(*shape, 1, dtype=torch.int32, device=device)
        self._refused, self._nobodys = (torch.tensor(x, device=device) for x in (self.refused, tokens + 1))
        self._first_row = torch.arange(batch * num_kv_heads, device=device).view(*shape, 1) * stride
        self.clear()

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return self._claim.size

    @property
    def written_to(self) -> tuple[Tensor, ...]:
        """What `put` uses, which may run on another queue than the rest."""
        return self.rows, self._first_row

    def advance(self) -> None:
        """Begin the next tick."""
        self.tick.add_(1)

    def look_up(self, positions: Tensor) -> Tensor:
        """Slots of the positions, `absent` for those that are not here; what is found counts as used in this tick."""
        slots = self.table.gather(-1, positions.masked_fill(positions < 0, self.tokens)).long()
        self._touch(slots)
        return slots

    def claim(self, positions: Tensor, missing: Tensor) -> Tensor:
        """Slots for the positions that are `missing` (bool [B, Hkv, k]), which are found there from now on.

        The least recently used ones, but none that was wanted in this tick: `refused` for a position that finds no other, and where
        nothing is missing. Their rows are for the caller to bring; until then nobody may read them.
        """
        victims = self._victims(missing)
        rank = missing.cumsum(-1).sub_(1).clamp_(min=0)  # n-th newcomer of its head
        slots = victims.gather(-1, rank).where(missing, self._refused)
        granted = slots != self._refused
        self._give(slots, torch.where(granted, positions, self._nobodys))
        self._touch(slots)
        return slots

    def forget(self, positions: Tensor, slots: Tensor) -> None:
        """Empty the slots that still belong to these positions; `slots` are from `claim`."""
        owned = (slots < self.capacity) & (self.owner.gather(-1, slots) == positions)
        slots = torch.where(owned, slots, self._refused)
        self._give(slots, self._nobodys.expand_as(slots))
        self.used.scatter_(-1, slots, self._long_ago().expand_as(slots))

    def put(self, slots: Tensor, rows: Tensor) -> None:
        """Write rows [B, Hkv, k, 2 D] into slots from `claim`."""
        self._flat().index_copy_(0, (slots + self._first_row).flatten(), rows.reshape(-1, self.width))

    def get(self, slots: Tensor, out: Tensor) -> None:
        """Read slots from `look_up` into `out` [B, Hkv, k, 2 D] (contiguous), zeros for `absent`."""
        torch.index_select(self._flat(), 0, (slots + self._first_row).flatten(), out=out.view(-1, self.width))

    def clear(self) -> None:
        """Empty all slots."""
        self.table.fill_(self.absent)
        self.owner.fill_(self.tokens + 1)
        self.used.copy_(self._long_ago().expand_as(self.used))

    def _victims(self, missing: Tensor) -> Tensor:
        """As many slots [B, Hkv, k] as are missing, ascending; `refused` behind them, and where nobody may be evicted."""
        age = (self.tick - self.used[..., : self.capacity]).clamp_(max=OLDEST)
        count = missing.sum(-1, keepdim=True)
        oldest = age.sort(dim=-1, descending=True, stable=True)  # of equals the first
        k = missing.shape[-1]
        evicted = (oldest.values[..., :k] > 0) & (torch.arange(k, device=age.device) < count)
        return oldest.indices[..., :k].where(evicted, self._refused).sort(dim=-1).values

    def _long_ago(self) -> Tensor:
        """The last use of slots that nobody has used."""
        return self.tick - OLDEST

    def _give(self, slots: Tensor, positions: Tensor) -> None:
        """Slots belong to these positions from now on, and those that they belonged to are absent."""
        self.table.scatter_(-1, self.owner.gather(-1, slots).long(), self.absent)
        self.table.scatter_(-1, positions, slots.int())
        self.owner.scatter_(-1, slots, positions.int())

    def _touch(self, slots: Tensor) -> None:
        self.used.scatter_(-1, slots, self.tick.expand_as(slots))

    def _flat(self) -> Tensor:
        return self.rows.view(-1, self.width)
