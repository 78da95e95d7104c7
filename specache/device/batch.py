"""The static state of a decoding batch: tensors keep their addresses while sequences grow.

`DeviceBatch` attaches sequences that decode together, and detaches them. Meanwhile residuals are in
one tensor per layer, page addresses in one table, and the numbers of a step (tokens, positions,
lengths) in one buffer that the host overwrites before the step. The host counts all lengths and
reads nothing from the device. Rows reach the slow tier a group at a time, before the step after
which the group is quantised and can be fetched. The rest follows when the sequences are detached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from specache.cache.compressed_layer import CompressedLayer
from specache.cache.window_layer import WindowLayer
from specache.config import PAGE_TOKENS, SpeCacheConfig
from specache.device.device_hot_set import DeviceHotSet
from specache.device.device_rows import DeviceRowFetcher, RowCounters, StepBuffers
from specache.device.fused_rows import device_row_fetcher
from specache.device.page_kernels import PageKernels, page_kernels
from specache.device.sources import row_source
from specache.device.static_sizes import batch_bytes, step_pairs
from specache.device.windows import WindowState
from specache.kernels.triton.tables import PageTables
from specache.model.dimensions import row_bytes
from specache.platform.budget import ByteBudget
from specache.tiers.streams import Queue, Streams

_NO_PAGES = np.empty(0, dtype=np.int64)


class CachedSequence(Protocol):
    """The interface of a sequence (`specache.cache.sequence.Sequence`) whose rows are in RAM."""

    tier: Any

    @property
    def length(self) -> int: ...
    @property
    def compressed(self) -> dict[int, CompressedLayer]: ...
    @property
    def sliding(self) -> dict[int, WindowLayer]: ...
    def quantise_oldest(self) -> None: ...


@dataclass(frozen=True)
class BatchSize:
    """The capacity of a batch.

    Attributes:
        queries: tokens per sequence and step, `n`.
        capacity: low-bit tokens per sequence, whole pages.
        hot_slots: hot-set slots per sequence and KV head, by layer.
    """

    queries: int
    capacity: int
    hot_slots: Mapping[int, int]


@dataclass
class LayerState:
    """One full-attention layer of `B` sequences.

    Attributes:
        layers: the layer of each sequence.
        key_scales: float32 [B, Hkv, D] of the rotated code, else `None`.
        residual: [B, 2, Hkv, R + g, D], keys and values.
        row_fetcher: `None` under a policy that fetches no rows.
        next_positions: int64 [B, Hkv, k], selected by the last step for the next one.
        used_positions: `next_positions` before the current step, under a policy that uses
            prefetched rows.
        finite: bool [], whether keys and values of the last step's real token were finite.
        begun: whether the layer has changed in the current step.
    """

    layers: list[CompressedLayer]
    tables: PageTables
    kernels: PageKernels
    key_scales: Tensor | None
    residual: Tensor
    row_fetcher: DeviceRowFetcher | None
    buffers: StepBuffers
    next_positions: Tensor
    used_positions: Tensor
    finite: Tensor
    begun: bool = False


class StepInputs:
    """The inputs of a step from the host, in one buffer on the device.

    Attributes:
        token_ids, position_ids: int64 [B, n].
        counts: int64 [B], tokens in the residual before the step.
        low_bit: int64 [B], tokens of the low-bit copy.
    """

    def __init__(self, sequences: int, queries: int, device: torch.device) -> None:
        self._buffer = torch.zeros(2 * sequences * queries + 2 * sequences, dtype=torch.int64, device=device)
        pairs, single = sequences * queries, sequences
        tokens, positions, self.counts, self.low_bit = self._buffer.split([pairs, pairs, single, single])
        self.token_ids, self.position_ids = tokens.view(sequences, queries), positions.view(sequences, queries)

    def set(self, tokens: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int], low_bit: Sequence[int]) -> None:
        """Copy a step's inputs to the device. tokens: [B][n], the first of each at positions
        `starts`.
        """
        flat = [token for row in tokens for token in row]
        positions = [start + i for start, row in zip(starts, tokens, strict=True) for i in range(len(row))]
        host = torch.tensor([*flat, *positions, *counts, *low_bit], dtype=torch.int64)
        _copy_to_device(host, self._buffer)


class DeviceBatch:
    """Sequences that decode together, with their state in static buffers that a captured step uses.

    Args:
        sequences: sequences whose full-attention layers are compressed and have fixed key scales.
        budget: fast memory for the hot sets and the other static buffers.

    Raises:
        FastMemoryError: the budget does not allow it; the sequences are unchanged.
        SlowTierError: the rows are in memory that the device cannot read.
    """

    def __init__(
        self, sequences: Sequence[CachedSequence], config: SpeCacheConfig, size: BatchSize, streams: Streams, budget: ByteBudget
    ) -> None:
        first = sequences[0].compressed
        one = next(iter(first.values())).residual_keys
        self.config, self.size, self.device = config, size, one.device
        self.sequences = list(sequences)
        self.top_k = step_pairs(config, size.capacity)
        self._claim = budget.claim(self._own_bytes(), "the static buffers of a step")
        self.inputs = StepInputs(len(sequences), size.queries, self.device)
        self.lengths = torch.zeros(len(sequences), dtype=torch.int32, device=self.device)
        # pairs that the real query selected, and those of them that were prefetched
        self.hits = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.counters = RowCounters(self.device, row_bytes(1, one.shape[2], one.itemsize))
        self.streams, self._budget = streams, budget
        self._pages = size.capacity // PAGE_TOKENS
        self._addresses = torch.zeros(len(first), len(sequences) * self._pages, dtype=torch.int64, device=self.device)
        sliding = sequences[0].sliding
        self._numbers = [*first, *sliding]  # layer numbers in the order of `finite`
        self.finite = torch.ones(len(self._numbers), dtype=torch.bool, device=self.device)
        self._stored = [sequence.length for sequence in sequences]  # tokens in the slow tier
        self._buffers: dict[tuple[int, int], StepBuffers] = {}
        self._of_sequence = [list(sequence.compressed.values()) for sequence in sequences]
        for layer in self._all_layers():
            layer.row_fetcher.free()
        self._make_room()
        self.layers = {index: self._layer(place, index) for place, index in enumerate(first)}
        for b in range(len(sequences)):
            for layer in self._of_sequence[b]:
                layer.move_residual(self.layers[layer.index].residual[b])
            self._write_addresses(b, 0)
        self.windows: dict[int, WindowState] = {}
        for place, index in enumerate(sliding, start=len(first)):
            self.windows[index] = WindowState.of([sequence.sliding[index] for sequence in sequences], self.finite[place])
            self.windows[index].attach()

    @property
    def outgrown(self) -> bool:
        """Whether the next step could exceed the capacity for low-bit tokens."""
        return any(self._low_bit(b) + self.config.group_size > self.size.capacity for b in range(len(self.sequences)))

    def begin(self, tokens: Sequence[Sequence[int]]) -> bool:
        """Prepare a step over tokens [B][n] -> whether a group is to be quantised after it."""
        for state in self.layers.values():
            state.begun = False
        pending = self._pending_sequences()
        for b in pending:
            self._store(b, self._low_bit(b) + self.config.group_size)
        lengths = [sequence.length for sequence in self.sequences]
        low_bit = [self._low_bit(b) for b in range(len(lengths))]
        counts = [length - low for length, low in zip(lengths, low_bit, strict=True)]
        self.inputs.set(tokens, lengths, counts, low_bit)
        return bool(pending)

    def ran(self) -> None:
        """Mark every layer as changed, after a step that may have been a replay."""
        for state in self.layers.values():
            state.begun = True

    def first_not_finite(self) -> int | None:
        """Return the first layer whose real token has NaN or infinity, or `None`.

        This and the logits are all that is read from the device.
        """
        finite = self.finite.tolist()
        return min((number for number, is_finite in zip(self._numbers, finite, strict=True) if not is_finite), default=None)

    def commit(self) -> None:
        """Count the real token, after the step has finished; quantise pending groups."""
        pending = self._pending_sequences()
        for layer in self._all_layers():
            layer.residual_count += 1
        for state in self.windows.values():
            state.commit()
        for b in pending:
            before = self._low_bit(b)
            self.sequences[b].quantise_oldest()
            self._write_addresses(b, before // PAGE_TOKENS)

    def row_counts(self) -> tuple[int, int, int]:
        """Return (pairs of the real query, hits, bytes read) so far. Waits for the device."""
        selected, ready, size = self.counters.read(self.streams)
        if not self.config.policy.verifies:
            selected, ready = self.hits.tolist()
        return selected, ready, size

    def undo(self) -> None:
        """Undo what a failed step selected for the next one."""
        for state in self.layers.values():
            if state.begun and not self.config.policy.verifies:
                state.next_positions.copy_(state.used_positions)

    def detach(self) -> None:
        """Move the whole state back into the sequences."""
        for fetcher in self._fetchers:
            fetcher.drop()
        self.streams.drain()
        for b, sequence in enumerate(self.sequences):
            self._store(b, sequence.length)
            for layer in self._of_sequence[b]:
                state = self.layers[layer.index]
                layer.move_residual(torch.empty_like(state.residual[b]))
                layer.next_positions = state.next_positions[b].clone() if self.top_k else None
        for window in self.windows.values():
            window.detach()

    def join(self) -> None:
        """Join the copy queue with the compute queue, at the end of a captured step."""
        for fetcher in self._fetchers:
            fetcher.join()

    def abandon_capture(self) -> None:
        """Reset the state after a failed capture, which has run nothing."""
        for state in self.layers.values():
            state.begun = False
        for fetcher in self._fetchers:
            fetcher.abandon()

    @property
    def _fetchers(self) -> list[DeviceRowFetcher]:
        """The row fetchers of all layers."""
        return [state.row_fetcher for state in self.layers.values() if state.row_fetcher is not None]

    def _own_bytes(self) -> int:
        layers = self.sequences[0].compressed.values()
        shapes = [(layer.residual_keys.shape[0], layer.residual_keys.shape[2]) for layer in layers]
        itemsize = next(iter(layers)).residual_keys.itemsize
        windows = len(self.sequences[0].sliding)
        return batch_bytes(shapes, windows, len(self.sequences), self.top_k, self.size.capacity, self.size.queries, itemsize)

    def _make_room(self) -> None:
        """Give all sequences' slow-tier buffers one size, enough for the batch's capacity."""
        tokens = self.size.capacity + self.config.residual + self.config.group_size
        tokens = max([tokens, *(sequence.tier.capacity for sequence in self.sequences)])
        for sequence in self.sequences:
            sequence.tier.make_room(tokens)
            sequence.tier.wait_for_offload()

    def _layer(self, place: int, index: int) -> LayerState:
        """Return the state of a layer. Residuals are not moved into it yet."""
        layers = [sequence.compressed[index] for sequence in self.sequences]
        one, batch = layers[0], len(layers)
        heads, _, dim = one.residual_keys.shape
        dtype, size = one.residual_keys.dtype, self.config.residual + self.config.group_size
        if (heads, dim) not in self._buffers:
            self._buffers[heads, dim] = StepBuffers(batch, heads, self.top_k, 2 * dim, dtype, self.device, self.size.queries)
        row_fetcher = self._row_fetcher(index, heads, dim, dtype) if self.top_k else None
        key_scales = [layer.key_scales.value for layer in layers if layer.key_scales.value is not None]
        state = LayerState(
            layers=layers,
            tables=PageTables(self._addresses[place].view(batch, self._pages), self.lengths),
            kernels=page_kernels(one.table.pool.layout, self.device),
            key_scales=torch.stack(key_scales) if key_scales else None,
            residual=one.residual_keys.new_zeros(batch, 2, heads, size, dim),
            row_fetcher=row_fetcher,
            buffers=self._buffers[heads, dim],
            next_positions=torch.full((batch, heads, self.top_k), -1, device=self.device),
            used_positions=torch.full((batch, heads, self.top_k), -1, device=self.device),
            finite=self.finite[place],
        )
        for b, layer in enumerate(layers):  # selected by pre-decoding or an earlier step
            if layer.next_positions is not None:
                state.next_positions[b, :, : layer.next_positions.shape[1]] = layer.next_positions
        if row_fetcher is not None:
            row_fetcher.submit(state.next_positions)
        return state

    def _row_fetcher(self, index: int, heads: int, dim: int, dtype: torch.dtype) -> DeviceRowFetcher:
        """Return a layer's row fetcher with a new hot set."""
        slots = max(self.size.hot_slots[index], self.top_k)
        hot = DeviceHotSet(len(self.sequences), heads, slots, self.size.capacity, 2 * dim, dtype, self.device, self._budget)
        source = row_source([sequence.tier.buffer(index) for sequence in self.sequences], self.device)
        return device_row_fetcher(source, hot, self._buffers[heads, dim], self.streams, self.counters, self.config.cuda_reads)

    def _pending_sequences(self) -> list[int]:
        """Return the sequences whose oldest group is to be quantised after the next token."""
        return [
            b for b, sequence in enumerate(self.sequences) if self.config.low_bit_length(sequence.length + 1) > self._low_bit(b)
        ]

    def _low_bit(self, b: int) -> int:
        return self._of_sequence[b][0].table.length

    def _all_layers(self) -> Iterator[CompressedLayer]:
        return chain.from_iterable(self._of_sequence)

    def _write_addresses(self, b: int, first: int) -> None:
        """The addresses of a sequence's pages from page `first` on, in every layer."""
        runs = [layer.low_bit_kv.runs for layer in self._of_sequence[b]]
        addresses = np.stack([np.concatenate([_NO_PAGES, *(run.addresses for run in of_layer)])[first:] for of_layer in runs])
        start = b * self._pages + first  # [L, pages]
        _copy_to_device(torch.from_numpy(addresses), self._addresses[:, start : start + addresses.shape[1]])

    def _store(self, b: int, stop: int) -> None:
        """Write a sequence's rows up to token `stop` into the slow tier."""
        for layer in self._of_sequence[b]:
            first = min(layer.table.length, self.sequences[b].length + 1 - layer.residual_count)  # also where `commit` failed
            start = max(self._stored[b], first)
            if stop > start:
                part = slice(start - first, stop - first)
                layer.tier.write(layer.index, start, layer.residual_keys[:, part], layer.residual_values[:, part])
        self._stored[b] = max(stop, self._stored[b])
        self.sequences[b].tier.wait_for_offload()
        self.streams.finish(Queue.COMPUTE)


def _copy_to_device(host: Tensor, into: Tensor) -> None:
    """Copy to `into`; to a GPU through pinned memory, queued without waiting."""
    into.copy_(host.pin_memory() if into.device.type == "cuda" else host, non_blocking=True)
