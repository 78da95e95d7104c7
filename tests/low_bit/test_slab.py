"""Slabs: what is free of them takes no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specache.low_bit.slab import Slab

CPU = torch.device("cpu")
PAGE_BYTES = 7000  # no multiple of the system's

pytestmark = pytest.mark.skipif(not Slab.is_lazy(CPU), reason="this system takes no part of a mapping back")


def resident(slab: Slab) -> int:
    """Bytes of the slab's mapping that have memory."""
    start = slab.data.data_ptr()
    for block in Path("/proc/self/smaps").read_text().split("VmFlags")[:-1]:
        lines = block.strip().splitlines()
        place = next(i for i, line in enumerate(lines) if "-" in line.split()[0] and not line.split()[0].endswith(":"))
        low, high = (int(part, 16) for part in lines[place].split()[0].split("-"))
        if low <= start < high:
            return int(next(line for line in lines[place:] if line.startswith("Rss:")).split()[1]) << 10
    raise AssertionError("the slab is no mapping")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_unused_and_freed_pages_take_no_memory():
    slab = Slab(2000, PAGE_BYTES, CPU)
    before = resident(slab)
    slab.data[:1000] = 1
    used = resident(slab)
    assert used - before >= 1000 * PAGE_BYTES - 2 * 4096
    slab.give_back([*range(100, 400), *range(500, 999)])
    assert resident(slab) <= used - 799 * PAGE_BYTES + 4 * 4096


def test_pages_beside_freed_ones_keep_their_bytes():
    slab = Slab(50, PAGE_BYTES, CPU)
    slab.data[:] = torch.arange(50, dtype=torch.uint8)[:, None]
    free = [3, 4, 5, 17, 30, 31, 49]
    slab.give_back(free)
    kept = [i for i in range(50) if i not in free]
    assert torch.equal(slab.data[kept], torch.tensor(kept, dtype=torch.uint8)[:, None].expand(-1, PAGE_BYTES))


def test_a_slab_begins_with_zeros_and_outlives_its_maker():
    data = Slab(3, PAGE_BYTES, CPU).data
    assert data.shape == (3, PAGE_BYTES) and not data.any()
    data[:] = 7
    assert data.sum() == 7 * data.numel()
