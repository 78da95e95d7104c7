"""The plan counts the temporary memory of reading and writing, even if one block is larger than a
buffer.
"""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import specache
from specache.config import SlowTierKind, SpeCacheConfig
from specache.model.dimensions import LayerDimensions, ModelDimensions, dimensions_of
from specache.planning import working_set
from specache.tiers.disk import aligned_io, probe, tier_files
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.disk.row_reads import READ_BYTES
from tests.cache.test_invariants import settings
from tests.peak import PeakMemory
from tests.tiers.tier_rows import random_rows
from tests.tiny import llama, prompt

TOKENS = 64 * 40
SMALL = 160_000  # checksums and salts, 8 bytes a row; a buffer is rounded up
SHAPES = [(2, 32), (8, 128), (24, 128), (40, 128), (40, 256)]  # blocks of 0.03 to 5 MB


class Buffers:
    """The aligned buffers alive now, and the most bytes of them at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.peak = 0
        make = aligned_io.AlignedBuffer.__init__

        def counted(buffer: aligned_io.AlignedBuffer, size: int) -> None:
            make(buffer, size)
            self.held += buffer.size
            self.peak = max(self.peak, self.held)
            weakref.finalize(buffer, self._gone, buffer.size)

        monkeypatch.setattr(aligned_io.AlignedBuffer, "__init__", counted)

    def _gone(self, size: int) -> None:
        self.held -= size


def peak(buffers: Buffers, action: Callable[[], Any]) -> int:
    """Return the peak bytes of buffers, arrays and tensors."""
    buffers.peak = buffers.held
    tracemalloc.start()
    with PeakMemory() as tensors:
        action()
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return buffers.peak + arrays + tensors.peak


def dimensions(heads: int, dim: int) -> ModelDimensions:
    """Return the dimensions of a model with such a layer, in float32."""
    return replace(dimensions_of(llama()), layers=(LayerDimensions(heads, heads, dim, None),))


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_reading_and_writing_a_prompt_stays_within_the_planned_memory(tmp_path, monkeypatch, heads, dim):
    config = SpeCacheConfig(slow_tier=f"disk:{tmp_path}")
    in_memory = replace(config, slow_tier=SlowTierKind.RAM, slow_dir=None)
    model = dimensions(heads, dim)
    counted = working_set.prefill_bytes(model, config, 64, 0) - working_set.prefill_bytes(model, in_memory, 64, 0)
    buffers = Buffers(monkeypatch)
    tier = DiskTier(tmp_path)
    tier.write(1, 0, *random_rows(heads, 64, dim, torch.float32))  # warms up the probe, code and constants
    tier.read(1, 0, 64)
    keys, values = random_rows(heads, TOKENS, dim, torch.float32)
    tail = 64 * 2 * heads * dim * 4
    for start in range(0, TOKENS, 64 * 8):
        part = keys[:, start : start + 64 * 8], values[:, start : start + 64 * 8]
        assert peak(buffers, lambda start=start, part=part: tier.write(0, start, *part)) <= counted + tail + SMALL
    for stop in range(64, TOKENS, 64 * 13):
        rows = stop * 2 * heads * dim * 4
        assert peak(buffers, lambda stop=stop: tier.read(0, 0, stop)) <= counted + rows + SMALL
    tier.close()


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_a_step_that_fills_a_block_stays_within_the_planned_memory(tmp_path, monkeypatch, heads, dim):
    config = SpeCacheConfig(slow_tier=f"disk:{tmp_path}", policy="none", top_k=1)
    in_memory = replace(config, slow_tier=SlowTierKind.RAM, slow_dir=None)
    model = dimensions(heads, dim)
    counted = working_set.decode_bytes(model, config, 1, 0) - working_set.decode_bytes(model, in_memory, 1, 0)
    buffers = Buffers(monkeypatch)
    tier = DiskTier(tmp_path)
    for layer in (1, 0):
        tier.write(layer, 0, *random_rows(heads, 63, dim, torch.float32))
    token = random_rows(heads, 1, dim, torch.float32)
    tier.write(1, 63, *token)
    tail = 64 * 2 * heads * dim * 4
    assert peak(buffers, lambda: tier.write(0, 63, *token)) <= counted + tail + SMALL
    tier.close()


def test_the_probe_takes_no_more_memory_than_reading_does(tmp_path, monkeypatch):
    """The probe runs during the first prefill, whose budget counts the memory of reads."""
    buffers = Buffers(monkeypatch)
    assert probe.probe(tmp_path).bytes_per_s is not None
    assert 0 < buffers.peak <= READ_BYTES
    assert buffers.held == 0


def test_the_planned_budget_covers_the_first_prefill_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_known", {})
    monkeypatch.setattr(tier_files, "report_for", probe.report_for)
    buffers, model = Buffers(monkeypatch), llama()
    config = settings(slow_tier=f"disk:{tmp_path}", fast_memory=16 << 20)
    with specache.SpeCache(model, config) as cache:
        specache.prefill(model, prompt(300), cache=cache)
        assert 0 < buffers.peak <= working_set.DISK_COPIES * READ_BYTES
        assert cache.stats()["fast_memory_peak_bytes"] <= 16 << 20
