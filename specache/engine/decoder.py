"""Prefill, pre-decode and decode steps of sequences of one cache (paper Algorithms 1 to 3).

Nothing here knows how tokens are chosen (`sampling`) or which sequences decode together (`engine`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specache.attention.decode import StepKind, StepSpec
from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence as CachedSequence
from specache.config import Policy, SpeCacheConfig
from specache.engine.attention_hook import attached, decode_forward, forward, reset_rope, warm_up
from specache.engine.compiled import begin_answer
from specache.engine.compiled_layers import CompiledLayers
from specache.engine.forward_pass import DecodePass, Observer, PrefillPass
from specache.engine.static_decoder import StaticDecoder
from specache.engine.traced import call_shape, traced_layers
from specache.engine.traced.layer_chain import ChainBrokenError
from specache.engine.traced.traced_layers import TracedAnswer
from specache.model.identity.code import is_hooked
from specache.model.identity.wrappers import unwrapped
from specache.planning.footprint import last_chunk
from specache.planning.working_set import decode_bytes, prefill_bytes
from specache.platform import modes
from specache.platform.out_of_memory import is_out_of_memory
from specache.stats import Counters

PrefillChunks = Generator[None, None, Tensor]
Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)
OnLogits = Callable[[int, Tensor], None]  # (first token of a chunk, logits [n, V] that follow its tokens)
MOST_CHANGES = 4  # of a model's layers in one answer, after which its steps are eager
LONG_REREAD = 1024  # most stored tokens that are prefilled again without a warning


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


class StopReading(Exception):
    """Thrown into a prefill to end it after the chunks that were read, which stay stored."""


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
        self._hooked = False  # whether the user's hooks see the passes of this answer

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
        self._hooked = is_hooked(self._model)

    @property
    def out_of_room(self) -> bool:
        """Return whether GPU steps run without static buffers because memory ran out."""
        return self._static.out_of_room

    @property
    def drafts(self) -> bool:
        """Return whether draft tokens are decoded beside the real ones.

        The user's hooks expect the passes of stock generate: `verified` gives the same tokens
        without drafts, and those of `speculative`, which decide what is fetched, get passes of
        their own.
        """
        policy = self._cache.config.policy
        return policy.drafts and not (self._hooked and policy is Policy.VERIFIED)

    def shared_pass(self, sequences: Sequence[CachedSequence]) -> int | None:
        """Return which others these sequences can share a step's pass with: those of equal numbers.

        `None` if their step takes several passes, or if a token's result depends on the others of
        its pass. Only a step of one pass leaves every sequence as it was when it fails.
        """
        groups = {self._rope_group(sequence) for sequence in sequences}
        if self._info.couples_rows or len(groups) > 1:
            return None
        side, stays, again = groups.pop()
        pairs = stays and not self._hooked and all(self._has_position(sequence.length + 1) for sequence in sequences)
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
        """Make a sequence store exactly `token_ids`, one chunk at a time (Algorithm 1).

        The longest stored prefix is kept; the rest goes through the model in chunks of `chunk`
        tokens. If a chunk fails, or the generator is closed early, the sequence is restored to the
        kept prefix. `StopReading`, thrown into it, keeps the chunks that were read.

        Args:
            observe: called with the queries of every full-attention layer and chunk.
            on_logits: called with the logits of every chunk.

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
            logits = yield from self._prefill_rest(sequence, token_ids, chunk, progress, observe, on_logits)
        sequence.prompt_tokens = sequence.length
        return logits

    def pre_decode(self, sequences: Sequence[CachedSequence], tokens: Sequence[int]) -> Tensor:
        """Decode each sequence's first new token over the low-bit keys and values (Algorithm 2).

        Nothing is stored.

        Returns:
            float32 logits [A, V] of the first draft tokens.
        """
        self._check_positions(sequences)
        with self._timed("decode_s"):
            logits = self._run_pass(StepKind.PRE_DECODE, sequences, [[token] for token in tokens])
        return logits[:, -1]

    def step(self, sequences: Sequence[CachedSequence], tokens: Sequence[int], drafts: Sequence[int] | None) -> StepLogits:
        """Decode one step: each sequence's token and its draft token in one pass (Algorithm 3).

        Args:
            drafts: the draft tokens, or `None` if the policy decodes none.
        """
        self._check_positions(sequences)
        result, compiled = StepLogits(len(sequences)), self._compiled is not None
        with self._timed("decode_s"):
            for indices in self._groups(sequences):
                self._step_group(indices, sequences, tokens, drafts, result)
            for sequence in sequences:
                sequence.end_step(compiled)
        counters = self._cache.counters
        counters.decoded_tokens += len(sequences)
        counters.decode_steps += 1
        counters.compiled_steps += compiled
        counters.traced_steps += self._traced is not None and call_shape.ran_program()
        return result

    def _reusable(self, sequence: CachedSequence, token_ids: list[int]) -> int:
        """Return how many stored tokens to keep: the common prefix, without the last token."""
        keep = 0
        for stored, wanted in zip(sequence.token_ids, token_ids, strict=False):
            if stored != wanted:
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
        """Warn if truncation dropped `tokens` that agree: windows go back to a checkpoint only."""
        if tokens > LONG_REREAD:
            warnings.warn(
                f"{tokens:,} stored tokens in front of where the text differs are read again too: the model's sliding windows "
                "cannot go back to that place.",
                UserWarning,
                stacklevel=3,
            )

    def _warn_of_hooks(self, stored: int, total: int, chunk: int) -> None:
        """Warn if the user's hooks see a prompt in several chunks, unlike in stock generate."""
        if total - stored > chunk and is_hooked(self._model):
            warnings.warn(
                f"The model's forward hooks get the prompt's {total - stored:,} tokens in chunks of {chunk:,}: one that looks at "
                "the first or last token of its input meets those of every chunk. With prefill_chunk_size=N for N tokens or more "
                "the prompt is one chunk.",
                UserWarning,
                stacklevel=3,
            )

    def _needs_prefill_again(self, stored: int, position: int) -> bool:
        """Return whether keys up to position `stored` are invalid for queries at `position`."""
        return not self._info.keeps_keys(stored, position)

    def _prefill_rest(
        self,
        sequence: CachedSequence,
        token_ids: list[int],
        chunk: int,
        progress: Progress,
        observe: Observer | None = None,
        on_logits: OnLogits | None = None,
        counter: str | None = "prefill_s",
    ) -> PrefillChunks:
        config = self._cache.config
        total = len(token_ids)
        with self._timed(counter):
            self._info.check_position(total - 1)
            if self._info.rope_side(total - 1) or self._info.couples_rows:
                chunk = total  # RoPE frequencies or activation scales depend on all tokens of a forward pass
            sequence.tier.reserve(self._static.row_room(total))
            sequence.begin_prefill()
            self._warn_of_hooks(sequence.length, total, chunk)
            progress(sequence.length, total)
        while True:
            with self._timed(counter):
                reset_rope(self._model, self._info)  # another sequence may have decoded since the last chunk
                with self._working_set(self._prefill_bytes(sequence, total, chunk, on_logits is not None)):
                    start = sequence.length
                    stop = min(start + chunk, total)
                    sequence.begin_chunk(stop, total)
                    state = PrefillPass(sequence, config.policy, config.top_k, stop == total, observe)
                    ids = token_ids[start:stop]
                    wanted = 1 if on_logits is None else len(ids)
                    logits = forward(self._model, self._ids([ids]), self._positions([start], len(ids)), state, logits=wanted)
                    if on_logits is not None:
                        on_logits(start, logits[0])
                    sequence.commit(ids)
                    sequence.end_chunk()
                    progress(stop, total)
                if stop == total:
                    sequence.prepare_decode()
                    return logits[0, -1]
            yield

    def _prefill_bytes(self, sequence: CachedSequence, total: int, chunk: int, all_logits: bool) -> int:
        model = self._cache.resources.dimensions
        tokens, stored = last_chunk(model, chunk, total, sequence.length)
        return prefill_bytes(model, self._cache.config, tokens, stored, logits=tokens if all_logits else 1)

    def _decode_bytes(self, sequences: Sequence[CachedSequence]) -> int:
        """Return the working set of a step. It changes with a sequence, a group or the settings."""
        config = self._cache.config
        size = config, len(sequences), max(config.low_bit_length(sequence.length + 1) for sequence in sequences)
        if size != self._step_size:
            self._step_size, self._step_bytes = size, decode_bytes(self._cache.resources.dimensions, *size)
        return self._step_bytes

    def _working_set(self, size: int) -> AbstractContextManager[None]:
        return self._cache.resources.budget.reserved(size, "the working set of a pass")

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
            logits = torch.stack([self._prefill_again(each, token) for each, token in zip(group, singles, strict=True)])[:, None]
        elif drafts is not None and self._drafts_share_pass(position, group):
            pairs = [[tokens[i], drafts[i]] for i in indices]
            logits = self._run_pass(StepKind.PAIR, group, pairs)
            result.set_draft(indices, logits[:, 1])
        else:
            logits = self._run_pass(StepKind.SINGLE, group, singles)
        result.set_real(indices, logits[:, 0])
        if drafts is not None and logits.shape[1] == 1:
            for i in indices:  # these draft tokens cannot share the pass of the real tokens
                result.set_draft([i], self._draft_alone(sequences[i], drafts[i], logits))

    def _drafts_share_pass(self, position: int, group: list[CachedSequence]) -> bool:
        """Return whether the group's draft tokens may run in the same pass as the real tokens."""
        together = self._positions_share_pass(position) and not self._hooked
        return together and all(self._has_position(sequence.length + 1) for sequence in group)

    def _draft_alone(self, sequence: CachedSequence, draft: int, real: Tensor) -> Tensor:
        """Return the logits [1, V] of a draft token in its own pass.

        A draft token beyond the model's last position gets the real token's: no step follows.
        """
        if not self._has_position(sequence.length):
            return real[:1, 0]
        return self._run_pass(StepKind.DRAFT, [sequence], [[draft]])[:, 0]

    def _has_position(self, position: int) -> bool:
        return self._info.position_limit is None or position < self._info.position_limit

    def _check_positions(self, sequences: Sequence[CachedSequence]) -> None:
        """Raise `UsageError` if a sequence's next token has no position. Nothing changes."""
        for sequence in sequences:
            self._info.check_position(sequence.length)

    def _positions_share_pass(self, position: int) -> bool:
        """Return whether `position` and the next one give the same result in one pass as in two."""
        return not self._info.couples_rows and self._info.rope_side(position) == self._info.rope_side(position + 1)

    def _prefill_again(self, sequence: CachedSequence, token: list[int]) -> Tensor:
        self._cache.release_device_batch()
        token_ids, prompt_tokens = sequence.token_ids + token, sequence.prompt_tokens
        sequence.clear()
        with self._restored_on_error(sequence):
            logits = last_of(self._prefill_rest(sequence, token_ids, len(token_ids), _ignore, counter=None))
        sequence.prompt_tokens = prompt_tokens
        return logits

    def _run_pass(self, kind: StepKind, sequences: Sequence[CachedSequence], tokens: list[list[int]]) -> Tensor:
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
        try:
            return self._one_pass(kind, sequences, tokens, chained=True)
        except ChainBrokenError:
            return self._one_pass(kind, sequences, tokens, chained=False)

    def _one_pass(self, kind: StepKind, sequences: Sequence[CachedSequence], tokens: list[list[int]], chained: bool) -> Tensor:
        config = self._cache.config
        if not self._hooked and self._static.supports(kind, sequences):  # a graph that is replayed calls no hooks
            static = self._static.step(sequences, tokens)
            if static is not None:
                return static
        self._cache.release_device_batch()
        spec = StepSpec(kind, config.policy, config.top_k, self._cache.counters)
        positions = self._positions([sequence.length for sequence in sequences], kind.queries)
        reset_rope(self._model, self._info)  # another sequence or a stock call may have changed the frequencies
        for sequence in sequences:
            sequence.begin_pass()
        try:
            with self._working_set(self._decode_bytes(sequences)):
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

    def _ids(self, tokens: list[list[int]]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.long, device=self._info.device)

    def _positions(self, starts: list[int], count: int) -> Tensor:
        """Return the positions [A, count] that begin at each start."""
        starts_column = torch.tensor(starts, dtype=torch.long, device=self._info.device)[:, None]
        return starts_column + torch.arange(count, device=self._info.device)

    @contextmanager
    def _restored_on_error(self, sequence: CachedSequence) -> Iterator[None]:
        length, windows, pending = sequence.length, sequence.windows(), sequence.pending_token
        try:
            yield
        except StopReading:
            sequence.prompt_tokens = sequence.length
            raise
        except BaseException:
            sequence.restore(length, windows)
            if sequence.length == length:
                sequence.pending_token = pending
            raise

    @contextmanager
    def _timed(self, counter: str | None) -> Iterator[None]:
        """Add the block's seconds to a counter. `None` counts nothing: the caller counts them."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if counter is not None:
                counters = self._cache.counters
                setattr(counters, counter, getattr(counters, counter) + time.perf_counter() - started)


def _scatter(into: Tensor | None, indices: list[int], logits: Tensor, count: int) -> Tensor:
    """Return `into` [count, V] with logits [len(indices), V] written to the rows `indices`."""
    if into is None:
        if len(indices) == count:
            return logits
        into = logits.new_empty(count, logits.shape[-1])
    into[indices] = logits
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
