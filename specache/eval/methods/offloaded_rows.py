"""Rows in slow memory, of which a method chooses and fetches some in every step.

Rows are read in units: single tokens, or pages of neighbouring tokens. Each KV head reads its own,
which its query heads choose together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.cache.sizes import ORDINARY_ITEMSIZE
from specache.errors import ConfigError
from specache.kernels.torch.operations import largest
from specache.model.dimensions import row_bytes

POSITION_BYTES = 4  # the position of a unit in the store of fetched ones (int32)
REDUCTIONS = ("mean", "max")


def check_reduction(reduction: str) -> None:
    """Raise `ConfigError` unless `reduction` is one that `choose` knows."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction is one of {', '.join(REDUCTIONS)}, got {reduction!r}.")


def choose(scores: Tensor, count: int, reduction: str) -> Tensor:
    """Return the units with the largest scores, int64 [Hkv, m], ascending; all of them if fewer.

    Args:
        scores: [Hkv, G, units]; of equal ones the first is chosen.
        count: units per KV head.
        reduction: joins the scores of a KV head's `G` query heads, `mean` or `max`.
    """
    joined = scores.mean(1) if reduction == "mean" else scores.amax(1)  # [Hkv, units]
    count = min(count, joined.shape[1])
    return largest(joined, count).nonzero()[:, 1].unflatten(0, (-1, count))


class OffloadedRows:
    """16-bit keys and values in slow memory, in units of `size` tokens.

    Args:
        keys, values: [Hkv, n, D] of the prompt, whole units. They are read in place.
        size: tokens of a unit.
    """

    def __init__(self, keys: Tensor, values: Tensor, size: int = 1) -> None:
        self.size = size
        self._prompt = self._in_units(keys), self._in_units(values)  # [Hkv, units, size, D]
        self._later = self._prompt[0][:, :0], self._prompt[1][:, :0]  # decoded tokens

    @property
    def count(self) -> int:
        """Return the number of units per KV head."""
        return self._prompt[0].shape[1] + self._later[0].shape[1]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append decoded tokens [Hkv, n, D], whole units."""
        device = self._prompt[0].device
        added = self._in_units(keys).to(device), self._in_units(values).to(device)
        self._later = torch.cat([self._later[0], added[0]], dim=1), torch.cat([self._later[1], added[1]], dim=1)

    def read(self, heads: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """Read unit `units[i]` of KV head `heads[i]` -> keys, values [n, size, D]."""
        heads, units = heads.to(self._prompt[0].device), units.to(self._prompt[0].device)
        first = self._prompt[0].shape[1]
        late = units >= first
        parts = []
        for prompt, later in zip(self._prompt, self._later, strict=True):
            rows = prompt.new_empty(len(units), self.size, prompt.shape[-1])
            rows[~late] = prompt[heads[~late], units[~late]]
            rows[late] = later[heads[late], units[late] - first]
            parts.append(rows)
        return parts[0], parts[1]

    def _in_units(self, rows: Tensor) -> Tensor:
        return rows.unflatten(1, (rows.shape[1] // self.size, self.size))


class FetchedRows:
    """The units of the last step, in fast memory. The next step reads only what it lacks.

    Args:
        slow: where the units are read from.
        slots: units that it holds at most per KV head.
        like: any rows [Hkv, n, D], which determine heads, dimension, dtype and device.

    Attributes:
        units: the units that it holds, int32 [Hkv, m], ascending.
        needed, hits: units asked for, and those of them that were already here, over all steps.
    """

    def __init__(self, slow: OffloadedRows, slots: int, like: Tensor) -> None:
        heads, _, dim = like.shape
        self._slow = slow
        self.slots = slots
        self._unit_bytes = row_bytes(1, dim, ORDINARY_ITEMSIZE) * slow.size + POSITION_BYTES
        self.units = torch.empty(heads, 0, dtype=torch.int32, device=like.device)
        self._keys = like.new_empty(heads, 0, slow.size, dim)
        self._values = like.new_empty(heads, 0, slow.size, dim)
        self.needed = self.hits = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of its slots, rows at 16 bits: no more than there are units."""
        return len(self.units) * min(self.slots, self._slow.count) * self._unit_bytes

    def take(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Fetch units [Hkv, m], ascending, and drop all others -> keys, values [Hkv, m size, D]."""
        slot, hit = self._find(units)
        heads, columns = (~hit).nonzero(as_tuple=True)
        read = self._slow.read(heads, units[heads, columns])
        every = torch.arange(len(units), device=units.device)[:, None]
        taken = []
        for held, rows in zip((self._keys, self._values), read, strict=True):
            moved = held[every, slot] if held.shape[1] else held.new_empty(*units.shape, *held.shape[2:])
            moved[heads, columns] = rows.to(held.device)
            taken.append(moved)
        self.needed += units.numel()
        self.hits += int(hit.sum())
        self.units, (self._keys, self._values) = units.int(), taken
        return self._keys.flatten(1, 2), self._values.flatten(1, 2)

    def _find(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slot of each unit and whether it is there, both [Hkv, m]."""
        held = self.units.long()
        if not held.shape[1]:
            return torch.zeros_like(units), torch.zeros_like(units, dtype=torch.bool)
        slot = torch.searchsorted(held, units.contiguous()).clamp_(max=held.shape[1] - 1)
        return slot, held.gather(1, slot) == units
