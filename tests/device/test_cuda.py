"""The same decode on a GPU: eager, and as a captured graph. Needs an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specache.config import ReadPath
from specache.device.device_hot_set import DeviceHotSet
from specache.device.device_rows import DeviceRowFetcher, RowCounters, StepBuffers
from specache.device.fused_rows import device_row_fetcher
from specache.device.sources import row_source
from specache.tiers.main_memory import MainMemory
from specache.tiers.pinned import PinnedPool
from specache.tiers.ram import RamTier
from specache.tiers.streams import CudaStreams
from tests.tiers.tier_rows import random_rows

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LAYERS, BATCH, HEADS, TOKENS, DIM, TOP_K, SLOTS, STEPS = 4, 2, 4, 4000, 64, 64, 160, 30
READS = pytest.mark.parametrize("read", list(ReadPath))


class GpuDecode:
    """Layers over rows in page-locked memory, and a step over static positions [3, L, B, Hkv, k]:
    real, guess, next.
    """

    def __init__(self, read: ReadPath) -> None:
        device = torch.device("cuda")
        self.streams = CudaStreams(device)
        memory = MainMemory(self.streams, PinnedPool(block_bytes=1 << 26))
        self.tiers = [memory.new_tier() for _ in range(BATCH)]
        self.stored = torch.stack(
            [torch.stack([self._write(tier, b, i) for b, tier in enumerate(self.tiers)]) for i in range(LAYERS)]
        )
        for tier in self.tiers:
            tier.wait_for_offload()
        self.buffers = StepBuffers(BATCH, HEADS, TOP_K, 2 * DIM, torch.bfloat16, device)
        self.counters = RowCounters(device, 4 * DIM)
        self.layers = [self._layer(i, read, device) for i in range(LAYERS)]
        self.wanted = torch.zeros(3, LAYERS, BATCH, HEADS, TOP_K, dtype=torch.int64, device=device)
        self.rows = torch.zeros(LAYERS, *self.buffers.kv_rows.shape, dtype=torch.bfloat16, device=device)
        self.positions = torch.zeros(LAYERS, *self.buffers.positions.shape, dtype=torch.int64, device=device)

    def step(self, joined: bool) -> None:
        for i, layer in enumerate(self.layers):
            layer.begin_step()
            layer.fetch(self.wanted[0, i])
            layer.available(self.wanted[1, i])
            self.rows[i].copy_(self.buffers.kv_rows)
            self.positions[i].copy_(self.buffers.positions)
            layer.submit(self.wanted[2, i])
        if joined:
            for layer in self.layers:
                layer.join()

    def check(self) -> None:
        here = self.positions >= 0
        index = self.positions.clamp(min=0).unsqueeze(-1).expand_as(self.rows)
        stored = self.stored.unsqueeze(1).expand(-1, 2, -1, -1, -1, -1)
        assert torch.equal(self.rows, stored.gather(4, index).masked_fill(~here.unsqueeze(-1), 0.0))
        assert torch.equal(self.positions[:, 0], self.wanted[0])

    def _write(self, tier: RamTier, b: int, layer: int) -> Tensor:
        keys, values = (x.cuda() for x in random_rows(HEADS, TOKENS, DIM, torch.bfloat16, seed=10 * layer + b))
        tier.write(layer, 0, keys, values)
        return torch.cat([keys, values], -1)

    def _layer(self, index: int, read: ReadPath, device: torch.device) -> DeviceRowFetcher:
        source = row_source([tier.buffer(index) for tier in self.tiers], device)
        hot = DeviceHotSet(BATCH, HEADS, SLOTS, TOKENS, 2 * DIM, torch.bfloat16, device)
        return device_row_fetcher(source, hot, self.buffers, self.streams, self.counters, read)


def selections(step: int) -> Tensor:
    """[3, L, B, Hkv, k], drifting with the steps, so that most of it is there from before."""
    generator = torch.Generator().manual_seed(step)
    near = torch.rand(3, LAYERS, BATCH, HEADS, 2 * TOP_K, generator=generator).argsort(-1)[..., :TOP_K].sort(-1).values
    return (near + 11 * step) % TOKENS


@READS
def test_every_step_gets_the_stored_rows(read):
    decode = GpuDecode(read)
    for step in range(STEPS):
        decode.wanted.copy_(selections(step))
        decode.step(joined=False)
        decode.check()
    selected, ready, fetched = decode.counters.read(decode.streams)
    assert 0 < ready < selected == STEPS * LAYERS * BATCH * HEADS * TOP_K
    assert fetched > 0


@READS
def test_a_captured_step_is_replayed_over_new_positions(read):
    decode, eager = GpuDecode(read), GpuDecode(read)
    decode.wanted.copy_(selections(0))
    decode.step(joined=True)
    eager.wanted.copy_(selections(0))
    eager.step(joined=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.step(joined=True)
    for step in range(1, STEPS):
        for one in (decode, eager):
            one.wanted.copy_(selections(step))
        graph.replay()
        eager.step(joined=False)
        decode.check()
    assert decode.counters.read(decode.streams) == eager.counters.read(eager.streams)


def test_rows_are_written_beside_the_computation_and_read_by_the_host():
    decode = GpuDecode(ReadPath.MAPPED)
    assert decode.tiers[0].buffer(0).is_pinned()
    for layer in range(LAYERS):
        read = torch.cat(decode.tiers[1].read(layer, 0, TOKENS), -1)
        assert torch.equal(read, decode.stored[layer, 1].cpu())
