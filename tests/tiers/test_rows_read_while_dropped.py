"""A background read of rows sees them as they were, whatever forks write meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specache.tiers import layer_rows
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import BLOCK_TOKENS

LENGTH = BLOCK_TOKENS // 2  # of the text, in one block
SHARED = LENGTH // 2  # of a fork that goes on from there


def rows(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, count, 8] that have the numbers of their tokens."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)[None, :, None].expand(1, count, 8)
    return numbers, numbers + 0.5


@pytest.mark.parametrize("leaves", ["writes", "is closed", "is cut"])
def test_a_fork_does_not_write_to_a_block_that_is_still_read(monkeypatch, leaves):
    tier = RamTier(in_place=False)
    tier.write(0, 0, *rows(0, LENGTH))
    fork = tier.fork()
    real: Any = layer_rows.native
    assert real is not None

    def gather(*args: Any) -> Any:
        """Read, after both have gone on: as when a thread of the reader stood for a moment."""
        if leaves == "writes":
            tier.write(0, LENGTH, *rows(1000, 1))  # copies the block, and leaves it to the fork
        elif leaves == "is closed":
            tier.close()
        else:
            tier.truncate_memory(0, 0)
        fork.write(0, SHARED, *rows(2000, 40))
        return real.gather_rows(*args)

    monkeypatch.setattr(layer_rows, "native", SimpleNamespace(gather_rows=gather))
    positions = torch.arange(SHARED, SHARED + 40)
    found = tier.gather(0, torch.zeros_like(positions), positions)
    monkeypatch.undo()
    keys, values = rows(SHARED, 40)
    assert torch.equal(found, torch.cat([keys, values], dim=2)[0])
    keys, values = fork.read(0, SHARED, SHARED + 40)
    assert torch.equal(keys, rows(2000, 40)[0])
    used = tier._memory.used
    tier.close()
    fork.close()
    assert used > 0 and tier._memory.used == 0


def test_a_block_that_was_read_is_free_for_its_last_user(monkeypatch):
    """It is not copied for ever because somebody once read it."""
    tier = RamTier(in_place=False)
    tier.write(0, 0, *rows(0, LENGTH))
    fork = tier.fork()
    real: Any = layer_rows.native

    def gather(*args: Any) -> Any:
        tier.close()
        return real.gather_rows(*args)

    monkeypatch.setattr(layer_rows, "native", SimpleNamespace(gather_rows=gather))
    tier.gather(0, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    before = tier._memory.peak
    fork.write(0, LENGTH, *rows(LENGTH, 1))
    assert tier._memory.peak == before  # no second block
