"""Prefill, pre-decode and decode steps of sequences of one cache (paper Algorithms 1 to 3).

It does not know how tokens are chosen (`sampling`) nor which sequences decode together (`engine`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specache.attention.decode import StepKind, StepSpec
from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence as CachedSequence
from specache.engine.attention_hook import decode_forward, forward, reset_rope
from specache.engine.forward_pass import DecodePass, Observer, PrefillPass
from specache.engine.static_decoder import StaticDecoder
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import prefill_working_set
from specache.planning.working_set import decode_bytes
from specache.platform.out_of_memory import is_out_of_memory
from specache.stats import Counters

PrefillChunks = Generator[None, None, Tensor]
Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)
LONG_REREAD = 1024  # stored tokens that are read again without a word: a few passes more


class StepLogits:
    """float32 [A, V] for the A sequences of a step: of the real row, and of the guess row where there is one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._real: Tensor | None = None
        self._draft: Tensor | None = None

    @property
    def real(self) -> Tensor:
        assert self._real is not None, "every sequence of a step has a real row"
        return self._real

    @property
    def draft(self) -> Tensor:
        assert self._draft is not None, "the policy decodes no guess row"
        return self._draft

    def set_real(self, places: list[int], logits: Tensor) -> None:
        self._real = _scatter(self._real, places, logits, self._count)

    def set_draft(self, places: list[int], logits: Tensor) -> None:
        self._draft = _scatter(self._draft, places, logits, self._count)


class Decoder:
    """Runs the model over a cache's sequences. The model must be `attached`."""

    def __init__(self, model: Any, cache: SpeCache) -> None:
        self._model = model
        self._cache = cache
        self._info = cache.info
        self._static = StaticDecoder(model, cache)

    @property
    def out_of_room(self) -> bool:
        """Whether steps on a GPU go on without static buffers because memory did not suffice for them."""
        return self._static.out_of_room

    @property
    def drafts(self) -> bool:
        """Return whether the policy decodes draft tokens beside the real ones."""
        return self._cache.config.policy.drafts

    @property
    def rows_are_independent(self) -> bool:
        """Return whether a row's numbers do not depend on the other rows of a pass."""
        return not self._info.couples_rows

    @property
    def counters(self) -> Counters:
        """Return what is counted of the cache's sequences."""
        return self._cache.counters

    def prefill(
        self, sequence: CachedSequence, token_ids: list[int], chunk: int, progress: Progress, observe: Observer | None = None
    ) -> Tensor:
        """Run `prefill_chunks` to its end and return the logits [V] of the last token."""
        return last_of(self.prefill_chunks(sequence, token_ids, chunk, progress, observe))

    def prefill_chunks(
        self, sequence: CachedSequence, token_ids: list[int], chunk: int, progress: Progress, observe: Observer | None = None
    ) -> PrefillChunks:
        """Bring a sequence to hold exactly `token_ids`, one chunk at a time (Algorithm 1).

        The stored tokens that agree are kept; the rest goes through the model in chunks of `chunk` tokens. Where a chunk fails, or
        the generator is closed before its end, the sequence goes back to what was kept.

        Args:
            observe: called with the queries of every full-attention layer and chunk.

        Yields:
            `None` after every chunk but the last.

        Returns:
            float32 logits [V] of the last token.
        """
        self._cache.release_device_batch()
        keep = self._reusable(sequence, token_ids)
        sequence.truncate(keep)
        self._warn_of_windows(keep - sequence.length)
        with self._restored_on_error(sequence):
            logits = yield from self._prefill_rest(sequence, token_ids, chunk, progress, observe)
        sequence.prompt_tokens = sequence.length
        return logits

    def pre_decode(self, sequences: Sequence[CachedSequence], tokens: Sequence[int]) -> Tensor:
        """Decode the first output token of each sequence over the low-bit keys and values (Algorithm 2). Nothing is stored.

        Returns:
            float32 logits [A, V] of the first draft tokens.
        """
        self._check_positions(sequences)
        with self._timed("decode_s"):
            logits = self._rows(StepKind.PRE_DECODE, sequences, [[token] for token in tokens])
        return logits[:, -1]

    def step(self, sequences: Sequence[CachedSequence], tokens: Sequence[int], drafts: Sequence[int] | None) -> StepLogits:
        """Decode one step: feed each sequence its token and, beside it, its draft token (Algorithm 3).

        Args:
            drafts: the speculative next tokens, or `None` where the policy decodes no draft row.
        """
        self._check_positions(sequences)
        result = StepLogits(len(sequences))
        with self._timed("decode_s"):
            for places in self._groups(sequences):
                self._step_group(places, sequences, tokens, drafts, result)
            for sequence in sequences:
                sequence.end_step()
        self._cache.counters.decoded_tokens += len(sequences)
        return result

    def _reusable(self, sequence: CachedSequence, token_ids: list[int]) -> int:
        """How many stored tokens can stay: the common prefix, less one if nothing would be left to run."""
        keep = 0
        for mine, theirs in zip(sequence.token_ids, token_ids, strict=False):
            if mine != theirs:
                break
            keep += 1
        keep = min(keep, len(token_ids) - 1)
        last = len(token_ids) - 1
        if keep and self._info.keeps_keys(sequence.length - 1, last) and self._info.keeps_keys(last, keep - 1):
            return keep
        if keep > LONG_REREAD:
            warnings.warn(
                f"{keep:,} stored tokens are read again too: the model's RoPE has other frequencies in texts of more than "
                f"{self._info.rope_switch:,} tokens.",
                UserWarning,
                stacklevel=3,
            )
        return 0

    def _warn_of_windows(self, tokens: int) -> None:
        """Warn where cutting a sequence cost `tokens` that agree: sliding windows go back to a checkpoint only."""
        if tokens > LONG_REREAD:
            warnings.warn(
                f"{tokens:,} stored tokens in front of where the text differs are read again too: the model's sliding windows "
                "cannot go back to that place.",
                UserWarning,
                stacklevel=3,
            )

    def _reprefills(self, stored: int, position: int) -> bool:
        """Whether keys up to position `stored` lost their meaning at `position`."""
        return not self._info.keeps_keys(stored, position)

    def _prefill_rest(
        self,
        sequence: CachedSequence,
        token_ids: list[int],
        chunk: int,
        progress: Progress,
        observe: Observer | None = None,
        counter: str | None = "prefill_s",
    ) -> PrefillChunks:
        config = self._cache.config
        total = len(token_ids)
        with self._timed(counter):
            self._info.check_position(total - 1)
            if self._info.rope_side(total - 1) or self._info.couples_rows:
                chunk = total  # frequencies (or scales of activations) depend on all rows of a forward pass
            sequence.tier.reserve(total)
            sequence.begin_prefill()
            progress(sequence.length, total)
        while True:
            with self._timed(counter):
                reset_rope(self._model, self._info)  # another sequence may have been decoded since the last chunk
                with self._working_set(self._prefill_bytes(sequence, total, chunk)):
                    start = sequence.length
                    stop = min(start + chunk, total)
                    sequence.begin_chunk(stop, total)
                    state = PrefillPass(sequence, config.policy, config.top_k, stop == total, observe)
                    ids = token_ids[start:stop]
                    logits = forward(self._model, self._ids([ids]), self._positions([start], len(ids)), state, logits=1)
                    sequence.commit(ids)
                    sequence.end_chunk()
                    progress(stop, total)
                if stop == total:
                    sequence.prepare_decode()
                    return logits[0, -1]
            yield

    def _prefill_bytes(self, sequence: CachedSequence, total: int, chunk: int) -> int:
        config = replace(self._cache.config, prefill_chunk=chunk)
        load = PlannedSequence(total, stored=sequence.length)
        return prefill_working_set(self._cache.resources.dimensions, config, load)

    def _decode_bytes(self, sequences: Sequence[CachedSequence]) -> int:
        config = self._cache.config
        longest = max(config.low_bit_length(sequence.length + 1) for sequence in sequences)
        return decode_bytes(self._cache.resources.dimensions, config, len(sequences), longest)

    def _working_set(self, size: int) -> AbstractContextManager[None]:
        return self._cache.resources.budget.reserved(size, "the working set of a pass")

    def _step_group(
        self,
        places: list[int],
        sequences: Sequence[CachedSequence],
        tokens: Sequence[int],
        drafts: Sequence[int] | None,
        result: StepLogits,
    ) -> None:
        """Decode the sequences that may share forward passes. `places` index the step's lists."""
        group = [sequences[i] for i in places]
        position = group[0].length
        rows = [[tokens[i]] for i in places]
        if position and self._reprefills(position - 1, position):
            logits = torch.stack([self._prefill_again(each, row) for each, row in zip(group, rows, strict=True)])[:, None]
        elif drafts is not None and self._pairs(position, group):
            pairs = [[tokens[i], drafts[i]] for i in places]
            logits = self._rows(StepKind.PAIR, group, pairs)
            result.set_draft(places, logits[:, 1])
        else:
            logits = self._rows(StepKind.SINGLE, group, rows)
        result.set_real(places, logits[:, 0])
        if drafts is not None and logits.shape[1] == 1:
            for i in places:  # a draft that may not share the pass has one of its own
                result.set_draft([i], self._draft_alone(sequences[i], drafts[i], logits))

    def _pairs(self, position: int, group: list[CachedSequence]) -> bool:
        """Whether the guesses of `group`, at one position further than their real tokens, may share their pass."""
        return self._share_a_pass(position) and all(self._has_position(sequence.length + 1) for sequence in group)

    def _draft_alone(self, sequence: CachedSequence, draft: int, real: Tensor) -> Tensor:
        """Return the logits [1, V] of a draft token in a pass of its own; any where it has no position: no step can follow."""
        if not self._has_position(sequence.length):
            return real[:1, 0]
        return self._rows(StepKind.DRAFT, [sequence], [[draft]])[:, 0]

    def _has_position(self, position: int) -> bool:
        return self._info.position_limit is None or position < self._info.position_limit

    def _check_positions(self, sequences: Sequence[CachedSequence]) -> None:
        """Raises `UsageError`, before anything changes, where a sequence has no position left for its next token."""
        for sequence in sequences:
            self._info.check_position(sequence.length)

    def _share_a_pass(self, position: int) -> bool:
        """Whether the row at a position gives the same numbers beside the next one as alone."""
        return not self._info.couples_rows and self._info.rope_side(position) == self._info.rope_side(position + 1)

    def _prefill_again(self, sequence: CachedSequence, row: list[int]) -> Tensor:
        self._cache.release_device_batch()
        token_ids, read = sequence.token_ids + row, sequence.prompt_tokens
        sequence.clear()
        with self._restored_on_error(sequence):
            logits = last_of(self._prefill_rest(sequence, token_ids, len(token_ids), _ignore, counter=None))
        sequence.prompt_tokens = read
        return logits

    def _rows(self, kind: StepKind, sequences: Sequence[CachedSequence], rows: list[list[int]]) -> Tensor:
        """One pass over rows [A][n] -> logits [A, n, V]. A failure leaves the sequences as they were.

        Where memory ran out, the hot sets are freed and the pass is tried once more.
        """
        try:
            return self._pass(kind, sequences, rows)
        except Exception as error:
            if not (is_out_of_memory(error) and self._frees_hot_sets()):
                raise
        if self._info.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._pass(kind, sequences, rows)  # outside of `except`: the error keeps the first pass's tensors alive

    def _pass(self, kind: StepKind, sequences: Sequence[CachedSequence], rows: list[list[int]]) -> Tensor:
        config = self._cache.config
        if self._static.serves(kind, sequences):
            static = self._static.step(sequences, rows)
            if static is not None:
                return static
        self._cache.release_device_batch()
        plan = StepSpec(kind, config.policy, config.top_k, self._cache.counters)
        positions = self._positions([sequence.length for sequence in sequences], kind.rows)
        reset_rope(self._model, self._info)  # another sequence's length, or a call outside, may have left its mark
        for sequence in sequences:
            sequence.begin_pass()
        try:
            with self._working_set(self._decode_bytes(sequences)):
                logits = decode_forward(self._model, self._ids(rows), positions, DecodePass(sequences, plan))
            for sequence in sequences:
                sequence.quantise_oldest()
        except BaseException:
            for sequence in sequences:
                sequence.undo_pass()
            raise
        if kind.commits:
            for sequence, row in zip(sequences, rows, strict=True):
                sequence.commit(row[:1])
        return logits

    def _frees_hot_sets(self) -> bool:
        """Give back what all hot sets take beyond the pairs of a step; whether that is anything. Says so."""
        freed = sum(sequence.free_hot_sets() for sequence in self._cache.sequences) if self._cache.config.hot_set else 0
        if freed:
            warnings.warn(
                f"Out of memory in a decode step: the hot sets ({freed:,} bytes) were freed and the step is tried again. What is "
                "generated does not change; every step fetches more from now on. With hot_set=0.0 there is none to begin with.",
                RuntimeWarning,
                stacklevel=2,
            )
        return freed > 0

    def _groups(self, sequences: Sequence[CachedSequence]) -> Iterator[list[int]]:
        """Places of the sequences by RoPE side of their next position: those of one side may share a pass."""
        sides: dict[tuple[int, ...], list[int]] = {}
        for place, sequence in enumerate(sequences):
            position = sequence.length
            side = self._info.rope_side(position)
            stays = self._info.rope_side(position + 1) == side
            again = bool(position) and self._reprefills(position - 1, position)
            sides.setdefault((side, stays, again), []).append(place)
        yield from sides.values()

    def _ids(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self._info.device)

    def _positions(self, starts: list[int], count: int) -> Tensor:
        """[A, count] from each start on."""
        starts_column = torch.tensor(starts, dtype=torch.long, device=self._info.device)[:, None]
        return starts_column + torch.arange(count, device=self._info.device)

    @contextmanager
    def _restored_on_error(self, sequence: CachedSequence) -> Iterator[None]:
        length, windows, pending = sequence.length, sequence.windows(), sequence.pending_token
        try:
            yield
        except BaseException:
            sequence.restore(length, windows)
            if sequence.length == length:
                sequence.pending_token = pending
            raise

    @contextmanager
    def _timed(self, counter: str | None) -> Iterator[None]:
        """Add the time in the block to a counter; `None`: the caller counts it."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if counter is not None:
                counters = self._cache.counters
                setattr(counters, counter, getattr(counters, counter) + time.perf_counter() - started)


def _scatter(into: Tensor | None, places: list[int], logits: Tensor, count: int) -> Tensor:
    """Put logits [len(places), V] at their places of [count, V]."""
    if into is None:
        if len(places) == count:
            return logits
        into = logits.new_empty(count, logits.shape[-1])
    into[places] = logits
    return into


def last_of(chunks: PrefillChunks) -> Tensor:
    """Run a prefill to its end and return its logits."""
    while True:
        try:
            next(chunks)
        except StopIteration as end:
            return end.value


def _ignore(done: int, total: int) -> None:
    pass
