"""The static state of a batch that decodes: tensors that stay where they are while its sequences grow.

`DeviceBatch` takes over sequences that decode together and gives them back. In between their layers' residuals lie in one tensor
per layer, page addresses in one table, and each step's numbers (tokens, positions, lengths) in one buffer that the host overwrites
before the step. All lengths follow from counting: nothing is read from the device. Rows reach the slow tier a group at a time,
before the step after which the group is low bit and can be fetched; the rest follow when the sequences are given back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from specache.cache.layers import CompressedLayer
from specache.cache.window_layer import WindowLayer
from specache.config import PAGE_TOKENS, Policy, SpeCacheConfig
from specache.device.device_hot_set import DeviceHotSet
from specache.device.device_rows import DeviceRows, RowCounters, StepBuffers
from specache.device.fused_rows import device_rows
from specache.device.page_kernels import PageKernels, page_kernels
from specache.device.sources import row_source
from specache.device.static_sizes import batch_bytes
from specache.device.windows import WindowState
from specache.kernels.triton.tables import PageTables
from specache.platform.budget import ByteBudget
from specache.tiers.streams import Queue, Streams

_NO_PAGES = np.empty(0, dtype=np.int64)


class CachedSequence(Protocol):
    """A sequence as a batch sees it (`specache.cache.sequence.Sequence`), its rows in RAM."""

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
    """What a batch has room for.

    Attributes:
        rows: tokens per sequence and step.
        capacity: low-bit tokens per sequence, whole pages.
        hot_slots: recently used rows that are kept per sequence and KV head, by layer.
    """

    rows: int
    capacity: int
    hot_slots: Mapping[int, int]


@dataclass
class LayerState:
    """One full-attention layer of `B` sequences.

    Attributes:
        layers: the sequences' own.
        weights: key weights float32 [B, Hkv, D] of the rotated code.
        residual: [B, 2, Hkv, R + g, D], keys and values.
        rows: `None` under a policy that fetches none.
        next_positions: int64 [B, Hkv, k], what the last step selected for the next one.
        used_positions: the same of the step before, under a policy that uses what was prefetched.
        finite: bool [], whether the keys and values of the last step's real row were.
        begun: the layer has changed in the step that is under way.
    """

    layers: list[CompressedLayer]
    tables: PageTables
    kernels: PageKernels
    weights: Tensor | None
    residual: Tensor
    rows: DeviceRows | None
    buffers: StepBuffers
    next_positions: Tensor
    used_positions: Tensor
    finite: Tensor
    begun: bool = False


class StepInputs:
    """What the host says about a step, in one buffer on the device.

    Attributes:
        token_ids, position_ids: int64 [B, n].
        counts: int64 [B], tokens in the residual before the step.
        low_bit: int64 [B], tokens of the low-bit copy.
    """

    def __init__(self, sequences: int, rows: int, device: torch.device) -> None:
        self._buffer = torch.zeros(2 * sequences * rows + 2 * sequences, dtype=torch.int64, device=device)
        pairs, single = sequences * rows, sequences
        tokens, positions, self.counts, self.low_bit = self._buffer.split([pairs, pairs, single, single])
        self.token_ids, self.position_ids = tokens.view(sequences, rows), positions.view(sequences, rows)

    def set(self, tokens: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int], low_bit: Sequence[int]) -> None:
        """tokens [B][n], the first at positions `starts`."""
        flat = [token for row in tokens for token in row]
        positions = [start + i for start, row in zip(starts, tokens, strict=True) for i in range(len(row))]
        host = torch.tensor([*flat, *positions, *counts, *low_bit], dtype=torch.int64)
        _copy(host, self._buffer)


class DeviceBatch:
    """Sequences that decode together, their state where a captured step finds it.

    Args:
        sequences: all their layers compressed, key weights fixed.
        budget: fast memory for the hot sets and everything else that is static.

    Raises:
        FastMemoryError: the budget does not allow it; the sequences are as they were.
        SlowTierError: the rows are where the device cannot read them.
    """

    def __init__(
        self, sequences: Sequence[CachedSequence], config: SpeCacheConfig, size: BatchSize, streams: Streams, budget: ByteBudget
    ) -> None:
        first = sequences[0].compressed
        one = next(iter(first.values())).residual_keys
        self.config, self.size, self.device = config, size, one.device
        self.sequences = list(sequences)
        self.top_k = min(config.top_k, size.capacity) if config.policy is not Policy.NONE else 0
        self._claim = budget.claim(self._own_bytes(), "the static buffers of a step")
        self.inputs = StepInputs(len(sequences), size.rows, self.device)
        self.lengths = torch.zeros(len(sequences), dtype=torch.int32, device=self.device)
        self.hits = torch.zeros(2, dtype=torch.int64, device=self.device)  # wanted by the real row, and of those prefetched
        self.counters = RowCounters(self.device, 2 * one.shape[2] * one.itemsize)
        self.streams, self._budget = streams, budget
        self._pages = size.capacity // PAGE_TOKENS
        self._addresses = torch.zeros(len(first), len(sequences) * self._pages, dtype=torch.int64, device=self.device)
        self._first_page = torch.arange(len(sequences), device=self.device) * self._pages
        sliding = sequences[0].sliding
        self._numbers = [*first, *sliding]  # of the layers, in the order of their flags
        self.finite = torch.ones(len(self._numbers), dtype=torch.bool, device=self.device)
        self._stored = [sequence.length for sequence in sequences]  # tokens in the slow tier
        self._buffers: dict[tuple[int, int], StepBuffers] = {}
        self._of_sequence = [list(sequence.compressed.values()) for sequence in sequences]
        for layer in self._all_layers():
            layer.rows.free()
        self._make_room()
        self.layers = {index: self._layer(place, index) for place, index in enumerate(first)}
        for b in range(len(sequences)):
            for layer in self._of_sequence[b]:
                layer.move_residual(self.layers[layer.index].residual[b])
            self._write_addresses(b, 0)
        self.windows: dict[int, WindowState] = {}
        for place, index in enumerate(sliding, start=len(first)):
            self.windows[index] = WindowState.of([sequence.sliding[index] for sequence in sequences], self.finite[place])
            self.windows[index].take()

    @property
    def outgrown(self) -> bool:
        """Whether the next step could need more low-bit tokens than there is room for."""
        return any(self._low_bit(b) + self.config.group_size > self.size.capacity for b in range(len(self.sequences)))

    def begin(self, tokens: Sequence[Sequence[int]]) -> bool:
        """Before a step over tokens [B][n] -> whether a group retires when it is over."""
        for state in self.layers.values():
            state.begun = False
        pending_group_tokens = self._retiring()
        for b in pending_group_tokens:
            self._store(b, self._low_bit(b) + self.config.group_size)
        lengths = [sequence.length for sequence in self.sequences]
        low_bit = [self._low_bit(b) for b in range(len(lengths))]
        counts = [length - low for length, low in zip(lengths, low_bit, strict=True)]
        self.inputs.set(tokens, lengths, counts, low_bit)
        return bool(pending_group_tokens)

    def ran(self) -> None:
        """Every layer has changed; a replay does not say so by itself."""
        for state in self.layers.values():
            state.begun = True

    def first_not_finite(self) -> int | None:
        """The first layer whose real row was not finite in the last step. The one thing that is read back, with the logits."""
        finite = self.finite.tolist()
        return min((number for number, is_finite in zip(self._numbers, finite, strict=True) if not is_finite), default=None)

    def commit(self) -> None:
        """The step is through every layer: its real row counts, and what it made the residuals too long for becomes low bit."""
        pending_group_tokens = self._retiring()
        for layer in self._all_layers():
            layer.residual_count += 1
        for state in self.windows.values():
            state.commit()
        for b in pending_group_tokens:
            before = self._low_bit(b)
            self.sequences[b].quantise_oldest()
            self._write_addresses(b, before // PAGE_TOKENS)

    def row_counts(self) -> tuple[int, int, int]:
        """(pairs that the real row wanted, those that were here, bytes read) since the batch began; waits for the device."""
        selected, ready, size = self.counters.read(self.streams)
        if not self.config.policy.verifies:
            selected, ready = self.hits.tolist()
        return selected, ready, size

    def undo(self) -> None:
        """The step failed, somewhere: what it selected for the next one is forgotten."""
        for state in self.layers.values():
            if state.begun and not self.config.policy.verifies:
                state.next_positions.copy_(state.used_positions)

    def give_back(self) -> None:
        """The sequences hold their whole state themselves again."""
        for rows in self._fetching:
            rows.drop()
        self.streams.drain()
        for b, sequence in enumerate(self.sequences):
            self._store(b, sequence.length)
            for layer in self._of_sequence[b]:
                state = self.layers[layer.index]
                layer.move_residual(torch.empty_like(state.residual[b]))
                layer.next_positions = state.next_positions[b].clone() if self.top_k else None
        for window in self.windows.values():
            window.give_back()

    def join(self) -> None:
        """Nothing of the step is left on the copy queue: the end of a step that is captured."""
        for rows in self._fetching:
            rows.join()

    def abandon_capture(self) -> None:
        """A capture failed. Nothing has run."""
        for state in self.layers.values():
            state.begun = False
        for rows in self._fetching:
            rows.abandon()

    @property
    def _fetching(self) -> list[DeviceRows]:
        """The rows of all layers."""
        return [state.rows for state in self.layers.values() if state.rows is not None]

    def _own_bytes(self) -> int:
        layers = self.sequences[0].compressed.values()
        shapes = [(layer.residual_keys.shape[0], layer.residual_keys.shape[2]) for layer in layers]
        itemsize = next(iter(layers)).residual_keys.itemsize
        windows = len(self.sequences[0].sliding)
        return batch_bytes(shapes, windows, len(self.sequences), self.top_k, self.size.capacity, self.size.rows, itemsize)

    def _make_room(self) -> None:
        """The slow tier's buffers of all sequences have one size, and stay where they are as long as the batch has room."""
        tokens = self.size.capacity + self.config.residual + self.config.group_size
        tokens = max([tokens, *(sequence.tier.capacity for sequence in self.sequences)])
        for sequence in self.sequences:
            sequence.tier.make_room(tokens)
            sequence.tier.wait_for_offload()

    def _layer(self, place: int, index: int) -> LayerState:
        """The state of a layer, which is not moved here yet."""
        layers = [sequence.compressed[index] for sequence in self.sequences]
        one, batch = layers[0], len(layers)
        heads, _, dim = one.residual_keys.shape
        dtype, size = one.residual_keys.dtype, self.config.residual + self.config.group_size
        if (heads, dim) not in self._buffers:
            self._buffers[heads, dim] = StepBuffers(batch, heads, self.top_k, 2 * dim, dtype, self.device, self.size.rows)
        rows = self._rows(index, heads, dim, dtype) if self.top_k else None
        weights = [layer.weights.value for layer in layers if layer.weights.value is not None]
        state = LayerState(
            layers=layers,
            tables=PageTables(self._addresses[place], self._first_page, self.lengths),
            kernels=page_kernels(one.table.pool.layout, self.size.capacity, self.device),
            weights=torch.stack(weights) if weights else None,
            residual=one.residual_keys.new_zeros(batch, 2, heads, size, dim),
            rows=rows,
            buffers=self._buffers[heads, dim],
            next_positions=torch.full((batch, heads, self.top_k), -1, device=self.device),
            used_positions=torch.full((batch, heads, self.top_k), -1, device=self.device),
            finite=self.finite[place],
        )
        for b, layer in enumerate(layers):  # what pre-decoding or an earlier step selected
            if layer.next_positions is not None:
                state.next_positions[b, :, : layer.next_positions.shape[1]] = layer.next_positions
        if rows is not None:
            rows.submit(state.next_positions)
        return state

    def _rows(self, index: int, heads: int, dim: int, dtype: torch.dtype) -> DeviceRows:
        """A layer's rows, and a hot set for them."""
        slots = max(self.size.hot_slots[index], self.top_k)
        hot = DeviceHotSet(len(self.sequences), heads, slots, self.size.capacity, 2 * dim, dtype, self.device, self._budget)
        source = row_source([sequence.tier.buffer(index) for sequence in self.sequences], self.device)
        return device_rows(source, hot, self._buffers[heads, dim], self.streams, self.counters, self.config.cuda_reads)

    def _retiring(self) -> list[int]:
        """Sequences whose oldest group retires after the next token."""
        return [
            b for b, sequence in enumerate(self.sequences) if self.config.low_bit_length(sequence.length + 1) > self._low_bit(b)
        ]

    def _low_bit(self, b: int) -> int:
        return self._of_sequence[b][0].table.length

    def _all_layers(self) -> Iterator[CompressedLayer]:
        return chain.from_iterable(self._of_sequence)

    def _write_addresses(self, b: int, first: int) -> None:
        """The addresses of a sequence's pages from page `first` on, in every layer."""
        runs = [layer.copy.runs for layer in self._of_sequence[b]]
        addresses = np.stack([np.concatenate([_NO_PAGES, *(run.addresses for run in of_layer)])[first:] for of_layer in runs])
        start = b * self._pages + first  # [L, pages]
        _copy(torch.from_numpy(addresses), self._addresses[:, start : start + addresses.shape[1]])

    def _store(self, b: int, stop: int) -> None:
        """Write a sequence's rows up to token `stop` into the slow tier, where the device finds them from now on."""
        for layer in self._of_sequence[b]:
            first = min(layer.table.length, self.sequences[b].length + 1 - layer.residual_count)  # also where `commit` failed
            start = max(self._stored[b], first)
            if stop > start:
                part = slice(start - first, stop - first)
                layer.tier.write(layer.index, start, layer.residual_keys[:, part], layer.residual_values[:, part])
        self._stored[b] = max(stop, self._stored[b])
        self.sequences[b].tier.wait_for_offload()
        self.streams.finish(Queue.COMPUTE)


def _copy(host: Tensor, into: Tensor) -> None:
    """To a GPU through pinned memory: the copy is queued, not waited for."""
    into.copy_(host.pin_memory() if into.device.type == "cuda" else host, non_blocking=True)
