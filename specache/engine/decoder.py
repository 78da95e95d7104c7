"""Prefill, pre-decode and decode steps of sequences of one cache (paper Algorithms 1 to 3).

Nothing here knows how tokens are chosen (`sampling`) or which sequences decode together (`engine`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specache.attention.decode import StepKind
from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence as CachedSequence
from specache.config import Policy
from specache.engine.attention_hook import attached, warm_up
from specache.engine.chunked_prefill import ChunkedPrefill, OnLogits, PrefillChunks, Progress, last_of
from specache.engine.compiled import begin_answer
from specache.engine.forward_pass import Observer
from specache.engine.model_passes import ModelPasses
from specache.model.identity.wrappers import unwrapped
from specache.platform import modes
from specache.stats import Counters, timed


def prepare_compiled(model: Any, policy: Policy, sequences: int) -> None:
    """Compile or load now what the next answer would compile or load before its first step.

    Nothing happens unless `compile_decode` was called. With `background=True` it may start the
    child process instead.

    Raises:
        ConfigError: compiling failed.
    """
    model = unwrapped(model)
    with modes.ours(), attached(model):
        begin_answer(model, policy, sequences, partial(warm_up, model))


class StepLogits:
    """The float32 logits [A, V] of a step's real tokens, and of its draft tokens if any."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._real: Tensor | None = None
        self._draft: Tensor | None = None

    @property
    def real(self) -> Tensor:
        assert self._real is not None, "every sequence of a step has a real token"
        return self._real

    @property
    def draft(self) -> Tensor:
        assert self._draft is not None, "the policy decodes no draft tokens"
        return self._draft

    def set_real(self, indices: list[int], logits: Tensor) -> None:
        self._real = _scatter(self._real, indices, logits, self._count)

    def set_draft(self, indices: list[int], logits: Tensor) -> None:
        self._draft = _scatter(self._draft, indices, logits, self._count)


class Decoder:
    """Runs the model over a cache's sequences. The model must be `attached`."""

    def __init__(self, model: Any, cache: SpeCache) -> None:
        self._cache = cache
        self._info = cache.info
        self._passes = ModelPasses(model, cache)
        self._prefill = ChunkedPrefill(model, cache, self._passes)

    def begin_answer(self, sequences: int) -> None:
        """Choose how the steps of the next answer, of so many sequences, run: compiled or traced.

        Raises:
            ConfigError: the model is to be compiled, and cannot be.
        """
        self._passes.begin_answer(sequences)

    @property
    def out_of_room(self) -> bool:
        """Return whether GPU steps run without static buffers because memory ran out."""
        return self._passes.out_of_room

    @property
    def drafts(self) -> bool:
        """Return whether draft tokens are decoded beside the real ones.

        The user's hooks expect the passes of stock generate: `verified` gives the same tokens
        without drafts, and those of `speculative`, which decide what is fetched, get passes of
        their own.
        """
        policy = self._cache.config.policy
        return policy.drafts and not (self._passes.hooked and policy is Policy.VERIFIED)

    def shared_pass(self, sequences: Sequence[CachedSequence]) -> int | None:
        """Return which others these sequences can share a step's pass with: those of equal numbers.

        `None` if their step takes several passes, or if a token's result depends on the others of
        its pass. Only a step of one pass leaves every sequence as it was when it fails.
        """
        groups = {self._rope_group(sequence) for sequence in sequences}
        if self._info.couples_rows or len(groups) > 1:
            return None
        side, stays, again = groups.pop()
        pairs = stays and not self._passes.hooked and all(self._has_position(sequence.length + 1) for sequence in sequences)
        return None if again or (self.drafts and not pairs) else 2 * side + stays

    @property
    def counters(self) -> Counters:
        """Return the cache's counters."""
        return self._cache.counters

    def prefill(
        self, sequence: CachedSequence, token_ids: list[int], chunk: int, progress: Progress, observe: Observer | None = None
    ) -> Tensor:
        """Run `prefill_chunks` to its end and return the logits [V] of the last token."""
        return last_of(self.prefill_chunks(sequence, token_ids, chunk, progress, observe))

    def prefill_chunks(
        self,
        sequence: CachedSequence,
        token_ids: list[int],
        chunk: int,
        progress: Progress,
        observe: Observer | None = None,
        on_logits: OnLogits | None = None,
    ) -> PrefillChunks:
        """Make a sequence store exactly `token_ids` (Algorithm 1): see `ChunkedPrefill.chunks`."""
        return self._prefill.chunks(sequence, token_ids, chunk, progress, observe, on_logits)

    def pre_decode(self, sequences: Sequence[CachedSequence], tokens: Sequence[int]) -> Tensor:
        """Decode each sequence's first new token over the low-bit keys and values (Algorithm 2).

        Nothing is stored.

        Returns:
            float32 logits [A, V] of the first draft tokens.
        """
        self._check_positions(sequences)
        with timed(self._cache.counters, "decode_s"):
            logits = self._passes.decode(StepKind.PRE_DECODE, sequences, [[token] for token in tokens])
        return logits[:, -1]

    def step(self, sequences: Sequence[CachedSequence], tokens: Sequence[int], drafts: Sequence[int] | None) -> StepLogits:
        """Decode one step: each sequence's token and its draft token in one pass (Algorithm 3).

        Args:
            drafts: the draft tokens, or `None` if the policy decodes none.
        """
        self._check_positions(sequences)
        result, compiled = StepLogits(len(sequences)), self._passes.is_compiled
        with timed(self._cache.counters, "decode_s"):
            for indices in self._groups(sequences):
                self._step_group(indices, sequences, tokens, drafts, result)
            for sequence in sequences:
                sequence.end_step(compiled)
        self._cache.counters.decoded_tokens += len(sequences)
        self._passes.count_step()
        return result

    def _step_group(
        self,
        indices: list[int],
        sequences: Sequence[CachedSequence],
        tokens: Sequence[int],
        drafts: Sequence[int] | None,
        result: StepLogits,
    ) -> None:
        """Decode the sequences at `indices` of the step, which may share forward passes."""
        group = [sequences[i] for i in indices]
        position = group[0].length
        singles = [[tokens[i]] for i in indices]
        if position and self._needs_prefill_again(position - 1, position):
            logits = torch.stack([self._prefill.again(each, token) for each, token in zip(group, singles, strict=True)])[:, None]
        elif drafts is not None and self._drafts_share_pass(position, group):
            pairs = [[tokens[i], drafts[i]] for i in indices]
            logits = self._passes.decode(StepKind.PAIR, group, pairs)
            result.set_draft(indices, logits[:, 1])
        else:
            logits = self._passes.decode(StepKind.SINGLE, group, singles)
        result.set_real(indices, logits[:, 0])
        if drafts is not None and logits.shape[1] == 1:
            for i in indices:  # these draft tokens cannot share the pass of the real tokens
                result.set_draft([i], self._draft_alone(sequences[i], drafts[i], logits))

    def _drafts_share_pass(self, position: int, group: list[CachedSequence]) -> bool:
        """Return whether the group's draft tokens may run in the same pass as the real tokens."""
        together = self._positions_share_pass(position) and not self._passes.hooked
        return together and all(self._has_position(sequence.length + 1) for sequence in group)

    def _draft_alone(self, sequence: CachedSequence, draft: int, real: Tensor) -> Tensor:
        """Return the logits [1, V] of a draft token in its own pass.

        A draft token beyond the model's last position gets the real token's: no step follows.
        """
        if not self._has_position(sequence.length):
            return real[:1, 0]
        return self._passes.decode(StepKind.DRAFT, [sequence], [[draft]])[:, 0]

    def _needs_prefill_again(self, stored: int, position: int) -> bool:
        """Return whether keys up to position `stored` are invalid for queries at `position`."""
        return not self._info.keeps_keys(stored, position)

    def _has_position(self, position: int) -> bool:
        return self._info.position_limit is None or position < self._info.position_limit

    def _check_positions(self, sequences: Sequence[CachedSequence]) -> None:
        """Raise `UsageError` if a sequence's next token has no position. Nothing changes."""
        for sequence in sequences:
            self._info.check_position(sequence.length)

    def _positions_share_pass(self, position: int) -> bool:
        """Return whether `position` and the next one give the same result in one pass as in two."""
        return not self._info.couples_rows and self._info.rope_side(position) == self._info.rope_side(position + 1)

    def _groups(self, sequences: Sequence[CachedSequence]) -> Iterator[list[int]]:
        """Yield the indices of sequences that may share a pass: with the same RoPE frequencies."""
        groups: dict[tuple[int, bool, bool], list[int]] = {}
        for index, sequence in enumerate(sequences):
            groups.setdefault(self._rope_group(sequence), []).append(index)
        yield from groups.values()

    def _rope_group(self, sequence: CachedSequence) -> tuple[int, bool, bool]:
        """Return (RoPE side of the next position, whether the next one has it, prefill again)."""
        position = sequence.length
        side = self._info.rope_side(position)
        again = bool(position) and self._needs_prefill_again(position - 1, position)
        return side, self._info.rope_side(position + 1) == side, again


def _scatter(into: Tensor | None, indices: list[int], logits: Tensor, count: int) -> Tensor:
    """Return `into` [count, V] with logits [len(indices), V] written to the rows `indices`."""
    if into is None:
        if len(indices) == count:
            return logits
        into = logits.new_empty(count, logits.shape[-1])
    into[indices] = logits
    return into
