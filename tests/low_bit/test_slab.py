"""Slabs: what is free of them takes no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specache.low_bit.slab import Slab

CPU = torch.device("cpu")
PAGE_BYTES = 7000  # no multiple of the system's

pytestmark = pytest.mark.skipif(not Slab.is_lazy(CPU), reason="this system takes no part of a mapping back")


def fields_of(slab: Slab) -> list[dict[str, str]]:
    """What the system tells of the mappings that the slab lies in."""
    start, found = slab.data.data_ptr(), []
    stop = start + slab.data.nbytes
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            low, high = (int(part, 16) for part in name.split("-"))
            fields: dict[str, str] = {}
            if low < stop and high > start:
                found.append(fields)
        fields[name] = rest.strip()
    assert found, "the slab is no mapping"
    return found


def resident(slab: Slab) -> int:
    """Bytes of the slab's mappings that have memory."""
    return sum(int(fields["Rss:"].split()[0]) << 10 for fields in fields_of(slab))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_unused_and_freed_pages_take_no_memory():
    slab = Slab(2000, PAGE_BYTES, CPU)
    before = resident(slab)
    slab.data[:1000] = 1
    used = resident(slab)
    assert used - before >= 1000 * PAGE_BYTES - 2 * 4096
    slab.give_back([*range(100, 400), *range(500, 999)])
    assert resident(slab) <= used - 799 * PAGE_BYTES + 4 * 4096


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
def test_huge_pages_are_asked_for_until_pages_are_given_back():
    slab = Slab(1000, PAGE_BYTES, CPU)
    assert any("hg" in fields["VmFlags:"].split() for fields in fields_of(slab))
    slab.give_back([5])
    assert not any("hg" in fields["VmFlags:"].split() for fields in fields_of(slab))


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
