"""The plain read: an array that no cache holds, the fastest way to read it, and its bandwidth."""

from __future__ import annotations

import pytest
import torch

from specache.bench import plain_read
from specache.bench.plain_read import LargeArray, evicting_bytes

MIB = 1 << 20


@pytest.fixture
def machine(monkeypatch):
    """Describe another machine by its last-level cache and its free memory."""

    def described(cache: int | None, free: int | None) -> None:
        monkeypatch.setattr(plain_read.machine, "last_level_cache", lambda: cache)
        monkeypatch.setattr(plain_read.machine, "available_memory", lambda: free)

    return described


@pytest.mark.parametrize(
    ("cache", "free", "expected"),
    [
        (320 * MIB, None, 1280 * MIB),
        (320 * MIB, 64 << 30, 1280 * MIB),
        (8 * MIB, 64 << 30, 256 * MIB),
        (None, 64 << 30, 256 * MIB),
        (320 * MIB, 1 << 30, 256 * MIB),  # no more than a quarter of what is free
    ],
)
def test_the_array_is_four_times_the_last_level_cache_within_the_free_memory(machine, cache, free, expected):
    machine(cache, free)
    assert evicting_bytes() == expected


def test_an_array_of_its_own_choice_has_that_size(machine):
    machine(8 * MIB, 8 * MIB)
    assert LargeArray(None).nbytes == 2 * MIB


def test_the_bandwidth_is_that_of_the_fastest_read_with_the_fastest_reader(monkeypatch):
    times = {"slow": iter([9.0] * 3), "fast": iter([5.0, 4.0, 4.5, 8.0, 2.0, 6.0])}
    monkeypatch.setattr(plain_read, "_READERS", {name: name for name in times})
    monkeypatch.setattr(plain_read, "_read_ms", lambda reader, array: next(times[reader]))
    array = LargeArray(8 * MIB)
    assert array.read() == 8.0
    assert array.best_gb_per_s() == pytest.approx(array.nbytes / 8.0 / 1e6)
    assert array.best_gb_per_s(reads=2) == pytest.approx(array.nbytes / 2.0 / 1e6)
    assert array.floor_ms(array.nbytes / 2) == pytest.approx(1.0)


@pytest.mark.parametrize("name", plain_read._READERS)
def test_every_reader_reads_the_whole_array(name):
    """An element that is not read could not make the result NaN."""
    for place in [(0, 0), (5, 100), (6, plain_read.WIDTH - 1)]:
        array = torch.ones(7, plain_read.WIDTH)
        assert not torch.as_tensor(plain_read._READERS[name](array)).isnan().any()
        array[place] = torch.nan
        assert torch.as_tensor(plain_read._READERS[name](array)).isnan().any(), place


def test_a_description_says_how_the_read_was_measured(machine):
    machine(4 * MIB, None)
    array = LargeArray(2 * MIB)
    array.read()
    described = array.describe()
    assert described["read_gb_per_s"] > 0 and described["cached_gb_per_s"] > 0
    assert described["array_bytes"] == 2 * MIB and described["last_level_cache_bytes"] == 4 * MIB
    assert described["reader"] in plain_read._READERS
