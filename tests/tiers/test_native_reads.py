"""The C++ reader of scattered rows returns the same rows as the plain reader, or None."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from specache.errors import CorruptRowError, SlowTierError
from specache.tiers.disk import native_reads, row_reads, tier_files
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.disk.native_reads import FLIGHTS, NativeRows
from specache.tiers.disk.probe import ReaderReport
from specache.tiers.disk.readers import RING_ENTRIES
from tests.tiers.tier_rows import fill, nothing_left, row_file

ANSWERS: list[bool] = []  # True per call in which the C++ reader returned rows


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
def test_native_rows_equal_those_of_the_plain_reader(tier, monkeypatch, memory, gap):
    """Also if the buffer holds only a few of the reads, and rows are requested twice."""
    monkeypatch.setattr(row_reads, "READ_BYTES", memory)
    monkeypatch.setattr(row_reads, "GAP_BYTES", gap)
    where = sample(200)
    rows = tier.gather(0, *where)
    assert ANSWERS == [True]
    monkeypatch.setattr(NativeRows, "gather", lambda *arguments: None)
    assert torch.equal(rows, tier.gather(0, *where))


def test_started_reads_return_the_rows_of_a_gather(tier):
    wanted = [sample(40, seed) for seed in range(FLIGHTS)]
    flights = [tier.begin(0, *where) for where in wanted]
    assert all(flights)
    assert tier.begin(0, *wanted[0]) is None  # the limit of reads in flight is reached
    for flight, where in zip(flights[::-1], wanted[::-1], strict=True):
        assert torch.equal(flight.wait(), tier.gather(0, *where))
        flight.cancel()  # a second cancel does nothing
    assert tier.begin(0, *wanted[0]) is not None


def test_cancelled_or_dropped_reads_leave_no_threads_or_descriptors(tier, tmp_path):
    where = sample(40)
    tier.gather(0, *where)
    with nothing_left(tmp_path):
        for _ in range(3 * FLIGHTS):
            tier.begin(0, *where).cancel()
            tier.begin(0, *where)
        assert all(tier.begin(0, *where) is not None for _ in range(FLIGHTS))


def test_a_started_read_completes_after_the_files_are_closed(tmp_path):
    tier = DiskTier(tmp_path)
    keys, values = fill(tier, 128)
    flight = tier.begin(0, torch.tensor([1, 0]), torch.tensor([5, 77]))
    tier.close()
    assert torch.equal(flight.wait(), torch.cat([keys, values], dim=-1)[[1, 0], [5, 77]])


def test_a_read_that_cannot_be_started_natively_takes_a_thread(tier, monkeypatch):
    many = sample(RING_ENTRIES * 3)
    with monkeypatch.context() as patch:
        patch.setattr(row_reads, "GAP_BYTES", 0)
        assert tier.begin(0, torch.zeros(9, dtype=torch.long), torch.arange(0, 576, 64)) is not None
        patch.setattr(row_reads, "READ_BYTES", 4096)
        assert tier.begin(0, *many) is None  # the buffer is too small
    monkeypatch.setattr(tier._files.reader(), "native", None)
    assert tier.begin(0, *sample(5)) is None


def test_a_flipped_bit_is_detected_in_a_started_read(tier):
    path = row_file(tier)
    data = np.fromfile(path, np.uint8)
    data[100] ^= 4
    data.tofile(path)
    with pytest.raises(CorruptRowError, match="token 384"):
        tier.begin(0, torch.tensor([0]), torch.tensor([384])).wait()
    assert torch.equal(
        tier.begin(0, torch.tensor([1]), torch.tensor([384])).wait(), tier.gather(0, torch.tensor([1]), torch.tensor([384]))
    )


def test_threads_share_a_reader(tier):
    wanted = [sample(64, seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda where: tier.gather(0, *where), wanted))
    assert all(torch.equal(rows, tier.gather(0, *where)) for rows, where in zip(together, wanted, strict=True))
    assert all(ANSWERS)


def test_a_flipped_bit_is_detected_in_a_gather(tier):
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


def test_a_truncated_file_is_detected(tier):
    row_file(tier).write_bytes(b"")
    with pytest.raises(SlowTierError, match="ends too early"):
        tier.gather(0, torch.tensor([0]), torch.tensor([400]))
    assert ANSWERS == [False]


def test_rows_are_read_without_the_cpp_extension(tmp_path, monkeypatch):
    monkeypatch.setattr(native_reads, "_native", None)
    with pytest.raises(OSError, match="extension"):
        NativeRows(8)
    tier = DiskTier(tmp_path)
    keys, values = fill(tier, 128)
    assert torch.equal(tier.gather(0, torch.tensor([1]), torch.tensor([5]))[0], torch.cat([keys[1, 5], values[1, 5]]))
    assert ANSWERS == []
    tier.close()
