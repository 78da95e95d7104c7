"""Decode steps on a GPU over static buffers, as CUDA graphs where they can be captured.

`StaticDecoder` attaches sequences to a `DeviceBatch` while the same sequences decode together.
`SpeCache.release_device_batch` moves their state back into the sequences. Call it before anything
else reads or changes them.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specache.attention.decode import StepKind
from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence as CachedSequence
from specache.device import page_kernels
from specache.device.batch import BatchSize, DeviceBatch
from specache.device.graph import CaptureError, GraphedSteps, Graphs, graphs_for
from specache.device.static_sizes import CAPACITY_STEP, HEADS_OF_BATCH, KINDS, low_bit_room, row_room, unsupported_reason
from specache.device.step import StaticPass
from specache.engine.attention_hook import decode_forward
from specache.engine.compiled_layers import CompiledLayers
from specache.errors import SlowTierError
from specache.kernels.finite import not_finite
from specache.planning.working_set import decode_bytes
from specache.platform.budget import Claim
from specache.platform.out_of_memory import is_out_of_memory
from specache.tiers.streams import Streams, streams_for


@dataclass(frozen=True)
class StaticSettings:
    """How static steps run. Tests replace them to run steps on the CPU."""

    streams: Callable[[torch.device], Streams] = streams_for
    graphs: Callable[[torch.device], Graphs | None] = graphs_for
    capacity_step: int = CAPACITY_STEP
    devices: tuple[str, ...] = ("cuda",)


SETTINGS = StaticSettings()


class StaticDecoder:
    """Runs decode steps of one cache over static buffers. The model must be `attached`."""

    def __init__(self, model: Any, cache: SpeCache) -> None:
        self._model = model
        self._cache: SpeCache = weakref.proxy(cache)  # it refers to `release_device_batch` while a batch is attached
        self._settings = SETTINGS
        self._graphs = cache.config.cuda_graph is not False
        self._batch: DeviceBatch | None = None
        self._sequences: list[CachedSequence] = []  # those attached to the batch
        self._steps = GraphedSteps(None)
        self._working_set: Claim | None = None
        self.compiled: CompiledLayers | None = None  # layers that run compiled
        self.out_of_room = False  # whether memory ran out for static buffers, so that ordinary steps run
        unsupported = self._unsupported_reason()
        self._disabled = unsupported or self._unsupported_layer()  # why no static step runs, or `None`
        if self._disabled and cache.config.cuda_graph:
            _warn(f"cuda_graph is on, but decode steps are not captured: {self._disabled}.")
        elif unsupported and self._on_device and cache.config.policy in KINDS:  # `quantise` warns of an unsupported layer
            _warn_once(f"Decode steps run on PyTorch operations, slower than over static buffers: {unsupported}.")

    def supports(self, kind: StepKind, sequences: Sequence[CachedSequence]) -> bool:
        """Return whether a pass can run over static buffers.

        Every sequence must have a low-bit copy, so at least `R + g` tokens.
        """
        config = self._cache.config
        least = config.residual + config.group_size
        if self._disabled or kind is not KINDS[config.policy] or any(sequence.length < least for sequence in sequences):
            return False
        heads = max((layer.kv_heads for layer in self._cache.resources.dimensions.full_layers), default=1)
        if len(sequences) * heads > HEADS_OF_BATCH:
            return False
        return self._cache.info.rope_switch is None or self._same_rope_side()

    def row_room(self, tokens: int) -> int:
        """Return for how many tokens to make the slow-tier buffers of a prompt of `tokens`."""
        return tokens if self._disabled else max(tokens, row_room(self._cache.config, tokens, self._settings.capacity_step))

    def step(self, sequences: Sequence[CachedSequence], tokens: list[list[int]]) -> Tensor | None:
        """Run one step over tokens [A][n], commit each first token and return logits [A, n, V].

        Return `None` if memory does not suffice for a batch. An error leaves the sequences
        unchanged.
        """
        if self._disabled or not self._attach(sequences):
            return None
        assert self._batch is not None
        try:
            logits = self._run(self._batch, tokens)
        except BaseException as error:
            retry = self._disable_cause(error)
            self._detach(failed=True)
            if not retry:
                raise
            logits = None
        if logits is None:  # outside of `except`: the error keeps the failed step's tensors alive
            return self.step(sequences, tokens)
        for sequence, row in zip(sequences, tokens, strict=True):
            sequence.commit(row[:1])
        return logits

    def release_device_batch(self) -> None:
        """Move the batch's state back into its sequences."""
        if self._batch is not None:
            self._detach(failed=False)

    def _run(self, batch: DeviceBatch, tokens: list[list[int]]) -> Tensor:
        config = self._cache.config
        kind = KINDS[config.policy]
        pending_groups = batch.begin(tokens) and config.policy.prefetches  # only what is selected for the next step depends on it

        def run() -> Tensor:
            state = StaticPass(batch, kind, config.policy, config.selection, pending_groups)
            inputs = batch.inputs
            logits = decode_forward(
                self._model, inputs.token_ids, inputs.position_ids, state, reads_back=False, layers=self.compiled
            )
            if self._graphs:
                batch.join()
            return logits

        logits = self._steps(pending_groups, run)
        batch.ran()
        if (layer := batch.first_not_finite()) is not None:
            raise not_finite(layer)
        batch.commit()
        return logits

    def _disable_cause(self, error: BaseException) -> bool:
        """Switch off the feature that made a step fail. Return whether to try the step again."""
        if isinstance(error, CaptureError):
            _warn(f"A decode step could not be captured as a CUDA graph ({error}). Steps go on without, slower.")
            self._graphs = False
            return True
        if isinstance(error, page_kernels.build_errors(self._cache.info.device)):
            self._disabled = f"a kernel could not be built ({error})"
            _warn(f"Decode steps go on without static buffers, slower: {self._disabled}.")
            return True
        if is_out_of_memory(error):
            self._disabled, self.out_of_room = "memory ran out in a step with static buffers", True
            _warn("Out of memory in a decode step: its static buffers were freed, and steps go on without, slower.")
            return True
        return False

    def _attach(self, sequences: Sequence[CachedSequence]) -> bool:
        """Attach the sequences to a batch. Return False if memory does not suffice."""
        batch = self._batch
        if batch is not None and not batch.outgrown and self._sequences == list(sequences):
            return True
        self._cache.release_device_batch()
        device = self._cache.info.device
        size = self._size(sequences)
        resources, config = self._cache.resources, self._cache.config
        try:
            working = decode_bytes(resources.dimensions, config, len(sequences), size.capacity)
            self._working_set = resources.budget.claim(working, "the working set of a step")
            self._batch = DeviceBatch(sequences, config, size, self._settings.streams(device), resources.budget)
        except Exception as error:
            if not (isinstance(error, SlowTierError) or is_out_of_memory(error)):
                raise
            self._disabled, self.out_of_room = str(error), is_out_of_memory(error)
            _warn(f"Decode steps go on without static buffers, slower: {error}")
            self._forget()
            for sequence in sequences:
                sequence.prepare_decode()
            return False
        self._sequences = list(sequences)
        self._steps = GraphedSteps(self._settings.graphs(device) if self._graphs else None)
        self._cache.detach_device_batch = self.release_device_batch
        return True

    def _size(self, sequences: Sequence[CachedSequence]) -> BatchSize:
        config = self._cache.config
        room = low_bit_room(config, max(sequence.length for sequence in sequences), self._settings.capacity_step)
        hot_slots = self._cache.context.hot_slots
        slots = {
            index: sum(hot_slots(sequence.length, sequence.compressed[index]) for sequence in sequences) // len(sequences)
            for index in sequences[0].compressed
        }
        return BatchSize(KINDS[config.policy].queries, room, slots)

    def _detach(self, failed: bool) -> None:
        batch = self._batch
        assert batch is not None
        steps = self._steps  # keeps the graphs alive until the device has finished them
        self._forget()
        if steps.capturing:
            batch.abandon_capture()
        if failed:
            batch.undo()
        batch.detach()
        self._count(batch)
        for sequence in self._sequences:
            if failed:
                sequence.begin_pass()
                sequence.undo_pass()
            if not self._disabled:
                sequence.prepare_decode()

    def _forget(self) -> None:
        self._batch, self._steps, self._cache.detach_device_batch = None, GraphedSteps(None), None
        if self._working_set is not None:
            self._working_set.release()

    def _count(self, batch: DeviceBatch) -> None:
        """Add the batch's counts on the device to the cache's counters."""
        counters = self._cache.counters
        selected, ready, size = batch.row_counts()
        counters.rows_selected += selected
        counters.rows_ready += ready
        counters.bytes_fetched += size

    @property
    def _on_device(self) -> bool:
        return self._cache.info.device.type in self._settings.devices

    def _same_rope_side(self) -> bool:
        """Return whether all sequences use the same RoPE frequencies.

        Otherwise two batches would alternate, and each would be built anew.
        """
        side = self._cache.info.rope_side
        return len({side(length) for sequence in self._cache.sequences for length in (sequence.length, sequence.length + 1)}) == 1

    def _unsupported_reason(self) -> str | None:
        """Return why these settings or this model cannot decode over static buffers, or `None`."""
        info, config = self._cache.info, self._cache.config
        if not self._on_device:
            return f"the model is on {info.device.type!r}"
        return unsupported_reason(config, info.rope_type == "dynamic")

    def _unsupported_layer(self) -> str | None:
        """Return why the kernels for static buffers do not support a layer here, or `None`."""
        info, config = self._cache.info, self._cache.config
        layers = set(self._cache.resources.dimensions.full_layers)
        kind = info.dtype, config.group_size, config.code
        reasons = (page_kernels.unsupported_reason(info.device, layer.head_dim, *kind) for layer in layers)
        return next((reason for reason in reasons if reason), None)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@functools.cache
def _warn_once(message: str) -> None:
    _warn(message)
