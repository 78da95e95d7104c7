"""The C++ way of reading scattered rows brings what the plain way brings, or nothing."""

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


def test_rows_that_were_begun_are_those_of_a_gather(tier):
    wanted = [sample(40, seed) for seed in range(FLIGHTS)]
    flights = [tier.begin(0, *where) for where in wanted]
    assert all(flights)
    assert tier.begin(0, *wanted[0]) is None  # enough of them
    for flight, where in zip(flights[::-1], wanted[::-1], strict=True):
        assert torch.equal(flight.take(), tier.gather(0, *where))
        flight.cancel()  # nothing is left to cancel
    assert tier.begin(0, *wanted[0]) is not None


def test_begun_reads_that_are_cancelled_or_forgotten_leave_nothing(tier, tmp_path):
    where = sample(40)
    tier.gather(0, *where)
    with nothing_left(tmp_path):
        for _ in range(3 * FLIGHTS):
            tier.begin(0, *where).cancel()
            tier.begin(0, *where)
        assert all(tier.begin(0, *where) is not None for _ in range(FLIGHTS))


def test_what_was_begun_arrives_though_the_files_are_closed(tmp_path):
    tier = DiskTier(tmp_path)
    keys, values = fill(tier, 128)
    flight = tier.begin(0, torch.tensor([1, 0]), torch.tensor([5, 77]))
    tier.close()
    assert torch.equal(flight.take(), torch.cat([keys, values], dim=-1)[[1, 0], [5, 77]])


def test_what_cannot_be_begun_takes_a_thread(tier, monkeypatch):
    many = sample(RING_ENTRIES * 3)
    with monkeypatch.context() as patch:
        patch.setattr(row_reads, "GAP_BYTES", 0)
        assert tier.begin(0, torch.zeros(9, dtype=torch.long), torch.arange(0, 576, 64)) is not None
        patch.setattr(row_reads, "READ_BYTES", 4096)
        assert tier.begin(0, *many) is None  # the buffer is too small
    monkeypatch.setattr(tier._files.reader(), "native", None)
    assert tier.begin(0, *sample(5)) is None


def test_a_flipped_bit_is_found_in_what_was_begun(tier):
    path = row_file(tier)
    data = np.fromfile(path, np.uint8)
    data[100] ^= 4
    data.tofile(path)
    with pytest.raises(CorruptRowError, match="token 384"):
        tier.begin(0, torch.tensor([0]), torch.tensor([384])).take()
    assert torch.equal(
        tier.begin(0, torch.tensor([1]), torch.tensor([384])).take(), tier.gather(0, torch.tensor([1]), torch.tensor([384]))
    )


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
