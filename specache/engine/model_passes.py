"""Forward passes of a model over sequences of one cache: what their layers run, their memory, and
what an error leaves.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specache.attention.decode import StepKind, StepSpec
from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence as CachedSequence
from specache.config import Policy, SpeCacheConfig
from specache.engine.attention_hook import decode_forward, forward, reset_rope, warm_up
from specache.engine.compiled import begin_answer
from specache.engine.compiled_layers import CompiledLayers
from specache.engine.forward_pass import DecodePass, PrefillPass
from specache.engine.static_decoder import StaticDecoder
from specache.engine.traced import call_shape, traced_layers
from specache.engine.traced.layer_chain import ChainBrokenError
from specache.engine.traced.traced_layers import TracedAnswer
from specache.linear.cpu_linear import MOST_FEW_ROWS
from specache.model.identity.code import is_hooked
from specache.planning.working_set import decode_bytes
from specache.platform.out_of_memory import is_out_of_memory
from specache.platform.step_threads import of_steps

MOST_CHANGES = 4  # of a model's layers in one answer, after which its steps are eager


class ModelPasses:
    """Runs the model, which must be `attached`, over a cache's sequences.

    Attributes:
        hooked: whether the user's hooks see the passes of this answer.
    """

    def __init__(self, model: Any, cache: SpeCache) -> None:
        self.hooked = False
        self._model = model
        self._cache = cache
        self._info = cache.info
        self._static = StaticDecoder(model, cache)
        # the settings, sequences and low-bit tokens that `_step_bytes` is for
        self._step_size: tuple[SpeCacheConfig, int, int] | None = None
        self._step_bytes = 0
        # what the steps of this answer run, else eager layers
        self._compiled: CompiledLayers | None = None
        self._traced: TracedAnswer | None = None
        self._changes = 0  # how often the model's layers changed during the answer

    def begin_answer(self, sequences: int) -> None:
        """Choose how the steps of the next answer, of so many sequences, run: compiled or traced.

        Raises:
            ConfigError: the model is to be compiled, and cannot be.
        """
        policy, counters = self._cache.config.policy, self._cache.counters
        self._compiled, counters.compile_error = begin_answer(self._model, policy, sequences, partial(warm_up, self._model))
        self._static.compiled = self._compiled
        self._traced = None if self._compiled or policy is Policy.FULL else traced_layers.begin_answer(self._model)
        self._changes = 0
        self.hooked = is_hooked(self._model)

    @property
    def out_of_room(self) -> bool:
        """Return whether GPU steps run without static buffers because memory ran out."""
        return self._static.out_of_room

    def row_room(self, tokens: int) -> int:
        """Return for how many tokens a sequence of `tokens` needs room in its slow tier."""
        return self._static.row_room(tokens)

    def count_step(self) -> None:
        """Count the step that just ended."""
        counters = self._cache.counters
        counters.decode_steps += 1
        counters.compiled_steps += self.is_compiled
        counters.traced_steps += self._traced is not None and call_shape.ran_program()

    @property
    def is_compiled(self) -> bool:
        """Return whether the steps of this answer run compiled layers."""
        return self._compiled is not None

    def prefill(self, token_ids: list[int], start: int, state: PrefillPass, *, logits: int) -> Tensor:
        """Run a chunk's tokens from position `start`; return its last logits [1, `logits`, V]."""
        few = len(token_ids) <= MOST_FEW_ROWS  # what was added to a text: its products are those of a step
        with of_steps[1].like_a_step() if few else nullcontext():
            return forward(self._model, self._ids([token_ids]), self._positions([start], len(token_ids)), state, logits=logits)

    def reset_rope(self) -> None:
        """Undo what another sequence or a stock call may have done to the RoPE frequencies."""
        reset_rope(self._model, self._info)

    def working_set(self, size: int) -> AbstractContextManager[None]:
        """Return a block that holds `size` bytes of the byte budget."""
        return self._cache.resources.budget.reserved(size, "the working set of a pass")

    def decode(self, kind: StepKind, sequences: Sequence[CachedSequence], tokens: list[list[int]]) -> Tensor:
        """Run one forward pass over tokens [A][n] and return logits [A, n, V].

        An error leaves the sequences unchanged. Out of memory, free the hot sets and retry once.
        """
        try:
            return self._try_pass(kind, sequences, tokens)
        except Exception as error:
            if not (is_out_of_memory(error) and self._free_hot_sets()):
                raise
        if self._info.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._try_pass(kind, sequences, tokens)  # outside of `except`: the error keeps the first pass's tensors alive

    def _try_pass(self, kind: StepKind, sequences: Sequence[CachedSequence], tokens: list[list[int]]) -> Tensor:
        with of_steps[len(sequences) * kind.queries].step():
            try:
                return self._one_pass(kind, sequences, tokens, chained=True)
            except ChainBrokenError:
                return self._one_pass(kind, sequences, tokens, chained=False)

    def _one_pass(self, kind: StepKind, sequences: Sequence[CachedSequence], tokens: list[list[int]], chained: bool) -> Tensor:
        config = self._cache.config
        if not self.hooked and self._static.supports(kind, sequences):  # a graph that is replayed calls no hooks
            static = self._static.step(sequences, tokens)
            if static is not None:
                return static
        self._cache.release_device_batch()
        spec = StepSpec(kind, config.policy, config.selection, self._cache.counters)
        positions = self._positions([sequence.length for sequence in sequences], kind.queries)
        self.reset_rope()
        for sequence in sequences:
            sequence.begin_pass()
        try:
            with self.working_set(self._decode_bytes(sequences)):
                state = DecodePass(sequences, spec)
                layers = self._compiled or self._traced_layers()
                logits = decode_forward(self._model, self._ids(tokens), positions, state, layers=layers, chained=chained)
            for sequence in sequences:
                sequence.quantise_oldest()
        except BaseException:
            for sequence in sequences:
                sequence.undo_pass()
            raise
        if kind.commits:
            for sequence, row in zip(sequences, tokens, strict=True):
                sequence.commit(row[:1])
        return logits

    def _traced_layers(self) -> TracedAnswer | None:
        """Return the layers with which this step runs, looked at again if something was replaced.

        Layers that keep changing run eagerly for the rest of the answer.
        """
        if self._traced is not None and not self._traced.seen.are_unchanged():
            self._changes += 1
            self._traced = traced_layers.begin_answer(self._model) if self._changes <= MOST_CHANGES else None
        return self._traced

    def _free_hot_sets(self) -> bool:
        """Free every hot set beyond one step's pairs, and warn. Return whether that freed any."""
        freed = sum(sequence.free_hot_sets() for sequence in self._cache.sequences) if self._cache.config.hot_set else 0
        if freed:
            warnings.warn(
                f"Out of memory in a decode step: the hot sets ({freed:,} bytes) were freed and the step is tried again. What is "
                "generated does not change; every step fetches more from now on. With hot_set=0.0 there is none to begin with.",
                RuntimeWarning,
                stacklevel=2,
            )
        return freed > 0

    def _decode_bytes(self, sequences: Sequence[CachedSequence]) -> int:
        """Return the working set of a step. It changes with a sequence, a group or the settings."""
        config = self._cache.config
        size = config, len(sequences), max(config.low_bit_length(sequence.length + 1) for sequence in sequences)
        if size != self._step_size:
            self._step_size, self._step_bytes = size, decode_bytes(self._cache.resources.dimensions, *size)
        return self._step_bytes

    def _ids(self, tokens: list[list[int]]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.long, device=self._info.device)

    def _positions(self, starts: list[int], count: int) -> Tensor:
        """Return the positions [A, count] that begin at each start."""
        starts_column = torch.tensor(starts, dtype=torch.long, device=self._info.device)[:, None]
        return starts_column + torch.arange(count, device=self._info.device)
