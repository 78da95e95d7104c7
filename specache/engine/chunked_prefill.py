"""Prefill of one sequence, a chunk of tokens at a time (paper Algorithm 1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence as CachedSequence
from specache.engine.forward_pass import Observer, PrefillPass
from specache.engine.model_passes import ModelPasses
from specache.model.identity.code import is_hooked
from specache.planning.footprint import last_chunk
from specache.planning.working_set import prefill_bytes
from specache.stats import timed

PrefillChunks = Generator[None, None, Tensor]
Progress = Callable[[int, int], None]  # (prompt tokens done, prompt tokens in all)
OnLogits = Callable[[int, Tensor], None]  # (first token of a chunk, logits [n, V] that follow its tokens)
LONG_REREAD = 1024  # most stored tokens that are prefilled again without a warning


class StopReading(Exception):
    """Thrown into a prefill to end it after the chunks that were read, which stay stored."""


class ChunkedPrefill:
    """Makes sequences of one cache store given tokens."""

    def __init__(self, model: Any, cache: SpeCache, passes: ModelPasses) -> None:
        self._model = model
        self._cache = cache
        self._info = cache.info
        self._passes = passes

    def chunks(
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

    def again(self, sequence: CachedSequence, token: list[int]) -> Tensor:
        """Prefill a sequence's own tokens and `token`, and return the logits [V] of the last."""
        self._cache.release_device_batch()
        token_ids, prompt_tokens = sequence.token_ids + token, sequence.prompt_tokens
        sequence.clear()
        with self._restored_on_error(sequence):
            logits = last_of(self._prefill_rest(sequence, token_ids, len(token_ids), _ignore, counter=None))
        sequence.prompt_tokens = prompt_tokens
        return logits

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
        """Warn if the user's hooks or modules see a prompt in several chunks, unlike stock."""
        if total - stored > chunk and is_hooked(self._model):
            warnings.warn(
                f"The model's forward hooks or modules of yours get the prompt's {total - stored:,} tokens in chunks of {chunk:,}: "
                "one that looks at the first or last token of its input meets those of every chunk. With "
                "prefill_chunk_size=N for N tokens or more the prompt is one chunk.",
                UserWarning,
                stacklevel=3,
            )

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
        with timed(self._cache.counters, counter):
            self._info.check_position(total - 1)
            if self._info.rope_side(total - 1) or self._info.couples_rows:
                chunk = total  # RoPE frequencies or activation scales depend on all tokens of a forward pass
            sequence.tier.reserve(self._passes.row_room(total))
            sequence.begin_prefill()
            self._warn_of_hooks(sequence.length, total, chunk)
            progress(sequence.length, total)
        while True:
            with timed(self._cache.counters, counter):
                self._passes.reset_rope()  # another sequence may have decoded since the last chunk
                with self._passes.working_set(self._prefill_bytes(sequence, total, chunk, on_logits is not None)):
                    start = sequence.length
                    stop = min(start + chunk, total)
                    sequence.begin_chunk(stop, total)
                    state = PrefillPass(sequence, config.policy, config.selection, stop == total, observe)
                    ids = token_ids[start:stop]
                    wanted = 1 if on_logits is None else len(ids)
                    logits = self._passes.prefill(ids, start, state, logits=wanted)
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


def last_of(chunks: PrefillChunks) -> Tensor:
    """Run a prefill to its end and return its logits."""
    while True:
        try:
            next(chunks)
        except StopIteration as end:
            return end.value


def _ignore(done: int, total: int) -> None:
    pass
