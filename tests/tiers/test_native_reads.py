"""The C++ way of reading scattered rows brings what the plain way brings, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from specache.errors import CorruptRowError, SlowTierError
from specache.tiers import native_reads, row_reads, tier_files
from specache.tiers.disk import DiskTier
from specache.tiers.native_reads import NativeRows
from specache.tiers.probe import ReaderReport
from tests.tiers.rows import fill, row_file

ANSWERS: list[bool] = []  # whether the C++ way brought rows, call by call


@pytest.fixture(autouse=True)
def through_io_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        NativeRows(8)
    except OSError as error:
        pytest.skip(str(error))
    gather = NativeRows.gather

    def watched(*arguments: object) -> object:
        rows = gather(*arguments)
        ANSWERS.append(rows is not None)
        return rows

    ANSWERS.clear()
    monkeypatch.setattr(NativeRows, "gather", watched)
    monkeypatch.setattr(tier_files, "report_for", lambda folder: ReaderReport("io_uring", False, 4096))


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    """640 tokens, the last of them in a second file."""
    first = DiskTier(tmp_path, temporary=False)
    fill(first, 400)
    second = first.fork()
    keys, values = (torch.randn(2, 256, 32).bfloat16() for _ in range(2))
    second.write(0, 384, keys, values)
    yield second
    second.close()
    first.close()


def sample(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator), torch.randint(0, 640, (count,), generator=generator)


@pytest.mark.parametrize("memory", [1 << 20, 3 * 4096])
@pytest.mark.parametrize("gap", [0, 1 << 14])
def test_rows_are_those_of_the_plain_way(tier, monkeypatch, memory, gap):
    """Also where the memory holds a few of the reads only, and rows are wanted twice."""
    monkeypatch.setattr(row_reads, "READ_BYTES", memory)
    monkeypatch.setattr(row_reads, "GAP_BYTES", gap)
    where = sample(200)
    rows = tier.gather(0, *where)
    assert ANSWERS == [True]
    monkeypatch.setattr(NativeRows, "gather", lambda *arguments: None)
    assert torch.equal(rows, tier.gather(0, *where))


def test_threads_share_a_reader(tier):
    wanted = [sample(64, seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda where: tier.gather(0, *where), wanted))
    assert all(torch.equal(rows, tier.gather(0, *where)) for rows, where in zip(together, wanted, strict=True))
    assert all(ANSWERS)


def test_a_flipped_bit_is_found(tier):
    path = row_file(tier)
    data = np.fromfile(path, np.uint8)
    data[100] ^= 4
    data.tofile(path)
    with pytest.raises(CorruptRowError, match="token 384"):
        tier.gather(0, torch.tensor([0]), torch.tensor([384]))
    assert ANSWERS == [False]
    assert torch.equal(
        tier.gather(0, torch.tensor([1]), torch.tensor([384])), tier.gather(0, torch.tensor([1]), torch.tensor([384]))
    )
    assert ANSWERS[1:] == [True, True]


def test_a_file_that_was_cut_is_found(tier):
    row_file(tier).write_bytes(b"")
    with pytest.raises(SlowTierError, match="ends too early"):
        tier.gather(0, torch.tensor([0]), torch.tensor([400]))
    assert ANSWERS == [False]


def test_without_the_extension_rows_are_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(native_reads, "_native", None)
    with pytest.raises(OSError, match="extension"):
        NativeRows(8)
    tier = DiskTier(tmp_path)
    keys, values = fill(tier, 128)
    assert torch.equal(tier.gather(0, torch.tensor([1]), torch.tensor([5]))[0], torch.cat([keys[1, 5], values[1, 5]]))
    assert ANSWERS == []
    tier.close()
