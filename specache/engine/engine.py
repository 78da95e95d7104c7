"""Requests in, tokens out: the one loop that decodes.

`Engine.step` prefills at most one chunk of a waiting prompt and decodes one token of every running
request. `specache.generate`, the evaluation suite and the benchmarks run on it. How tokens are
chosen is up to `runs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from traceback import clear_frames
from typing import Any

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence as CachedSequence
from specache.config import SpeCacheConfig
from specache.engine.attention_hook import attached
from specache.engine.batch_step import BatchStep
from specache.engine.decoder import Decoder
from specache.engine.handle import Handle, Request
from specache.engine.prefix_reuse import PrefixReuse
from specache.engine.prompt_reader import PromptReader, free
from specache.engine.recovery import tokens_kept_on_error
from specache.engine.request_queue import RequestQueue
from specache.engine.room import Room, chunk_of, logit_bytes_of
from specache.engine.runs import GivenRun, Run, SampledRun
from specache.engine.uncopied import Uncopied
from specache.errors import UsageError
from specache.model.identity.wrappers import unwrapped
from specache.planning.footprint import PlannedSequence
from specache.platform import modes


class Engine(Uncopied):
    """Decodes many requests over one model in one batch that they join and leave.

    A request's result does not depend on the rest of the batch, up to rounding in larger matrix
    products. An error of one request ends only that request. Any thread may add and abort requests.
    One thread at a time runs a step, and calls the processors, criteria and streamers.

        engine = specache.Engine(model, specache.SpeCacheConfig())
        handle = engine.add(specache.make_request(model, input_ids, max_new_tokens=100, seed=1))
        while engine.step(): ...
        tokens = handle.result()

    Args:
        model: a transformers model for text generation.
        config: settings of the cache that all requests share, including `fast_memory`.

    Attributes:
        chunk: the most prompt tokens per forward pass, at first `prefill_chunk` of the settings.

    Raises:
        UnsupportedModelError, ConfigError, SlowTierError: as `SpeCache`.
    """

    instead = "Make another one: specache.Engine(model, config)."

    def __init__(self, model: Any, config: SpeCacheConfig | None = None) -> None:
        self._begin(model, SpeCache(model, config), owns_cache=True)

    def beside(self, **changes: Any) -> Engine:
        """Return another engine over the same fast memory, with changed settings of the cache.

        Raises:
            ConfigError, UsageError: the settings are not possible, or not over the same memory.
        """
        with modes.ours():
            cache = self.cache.empty_fork(**changes)
        engine = object.__new__(Engine)
        engine._begin(self._model, cache, owns_cache=True, room=self.room)
        engine.chunk = self.chunk
        return engine

    @classmethod
    def over(cls, model: Any, cache: SpeCache) -> Engine:
        """Return an engine over the caller's cache, whose `in_use` the caller holds meanwhile."""
        engine = object.__new__(cls)
        engine._begin(model, cache, owns_cache=False)
        return engine

    def _begin(self, model: Any, cache: SpeCache, owns_cache: bool, room: Room | None = None) -> None:
        self.cache = cache
        self.chunk = cache.config.prefill_chunk
        self._model = unwrapped(model)
        self._decoder = Decoder(self._model, cache)
        self._owns_cache = owns_cache
        self.room = room or Room(self._model)
        if owns_cache:
            self.room.tenants.add(self)
        self._queue = RequestQueue()
        self._reader = PromptReader(self._decoder, cache)
        self._full = False  # the oldest waiting request does not fit, and no request has ended since
        self._full_bytes = 0  # fast memory that was in use then
        self._running: dict[Handle, Run] = {}
        self._attached: ExitStack | None = None  # set while the model calls our attention (own cache only)

    @property
    def out_of_room(self) -> bool:
        """Return whether GPU steps run without static buffers because memory ran out."""
        return self._decoder.out_of_room

    @property
    def has_prompt(self) -> bool:
        """Return whether a request waits or its prompt is being read."""
        return bool(self._queue) or self._reader.handle is not None

    @property
    def has_work(self) -> bool:
        """Return whether a step has anything to do, or a request waits for memory."""
        return self.has_prompt or any(isinstance(run, SampledRun) for run in self._running.values())

    @property
    def is_blocked(self) -> bool:
        """Return whether a request waits for memory although nothing runs."""
        return self._full and not self._running and self._reader.handle is None

    def planned(self) -> list[PlannedSequence]:
        """Return the sequences of the requests that run, with what they still store."""
        planned = [one for handle in self._running for one in handle.request.planned_rest()]
        reading = self._reader.handle
        return planned if reading is None else planned + reading.request.planned_now()

    def logit_bytes(self) -> int:
        """Return the bytes of the logits of the prompt that is read, which no plan counts."""
        reading = self._reader.handle
        return (
            0 if reading is None else logit_bytes_of(reading.request, self.cache, chunk_of(reading.request, self.chunk, self.cache))
        )

    def add(self, request: Request, on_end: Callable[[Handle], None] | None = None, reuse: PrefixReuse | None = None) -> Handle:
        """Queue a request. Requests are prefilled in order, each as soon as memory allows.

        Args:
            on_end: called with the handle when the request is done, on the thread of the step.
            reuse: the stored prefixes that it may go on from and leave.

        Raises:
            UsageError: the engine is closed, or the request ran before or is for another model.
        """
        request.check_model(self._model)
        if request.state.new_token_ids() is not None:
            raise UsageError("This request ran before. Make another one with specache.make_request(model, ...).")
        handle = Handle(request, on_end, reuse)
        self._queue.add(handle)
        return handle

    def abort(self, handle: Handle) -> None:
        """End a request at the next step. `handle.new_token_ids` keeps its tokens."""
        self._queue.abort(handle)

    def retry(self) -> None:
        """Have the next step check again whether the oldest request fits: memory became free."""
        self._full = False

    def step(self) -> bool:
        """Run one step and return whether any request is left.

        Raises:
            UsageError: another thread runs a step, or a callback of a step called this.
            KeyboardInterrupt: the requests it met ended as `interrupted`; the others go on.
        """
        with modes.ours(), self._using_cache("Engine.step"):
            modes.check_process()
            try:
                self._step()
            finally:
                if not self.has_work:
                    self._detach()
            return self.has_work

    def run(self, request: Request) -> None:
        """Run one request to its end, within `modes.ours()` and `attached()`. Raise its error."""
        handle = self.add(request)
        try:
            while not handle.done:
                self._step()
        except BaseException as error:  # also Ctrl-C
            if not handle.done:
                self._end(handle, error)
            raise

    def close(self) -> None:
        """Abort every request and free the cache.

        Raises:
            UsageError: another thread runs a step. Nothing changed.
        """
        with self._using_cache("Engine.close"), ExitStack() as stack:
            if self._owns_cache:
                stack.callback(self.cache.free)
            stack.callback(self._detach)
            unfinished = {*self._queue.close(), *self._running}
            for handle in unfinished if self._reader.handle is None else unfinished | {self._reader.handle}:
                stack.callback(self._end, handle, None, "aborted")

    def resume(
        self, sequences: list[CachedSequence], tokens: list[int] | None = None, drafts: Sequence[int] | None = None
    ) -> GivenRun:
        """Decode prefilled sequences with tokens that the caller gives to `GivenRun.give`.

        Args:
            tokens: the first ones [B]. With them pre-decoding runs now, else in the first step.
            drafts: the draft tokens [B] beside them. With them there is no pre-decoding.
        """
        run = GivenRun(sequences)
        if drafts is not None and self._decoder.drafts:
            run.drafts = list(drafts)
        for sequence in sequences:
            sequence.prepare_decode()
        self._running[Handle(Request.of_sequences(sequences))] = run
        with attached(self._model):
            self.begin_answer()
        if tokens is not None:
            run.give(tokens, self.cache.counters)
            with modes.ours(), attached(self._model):
                BatchStep(self._decoder, self._running, self._errors_of, self._end).pre_decode()
        return run

    def begin_answer(self) -> None:
        """Choose again how the next steps run the layers of the model, which is `attached`."""
        with modes.ours():
            self._decoder.begin_answer(sum(len(run.sequences) for run in self._running.values()))

    def __del__(self) -> None:
        self._detach()  # an engine that was never closed must not leave its model attached

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _step(self) -> None:
        self._schedule()
        if self._owns_cache:
            self._make_room_for_rows()
        self._prefill_chunk()
        self._decode()
        self._finish()

    def _make_room_for_rows(self) -> None:
        reading = self._reader.handle
        sequences = sum(len(handle.request.sequences) for handle in self._running)
        more = (0, 0) if reading is None else (len(reading.request.token_ids), reading.request.chunk or self.chunk)
        self.room.make_room_for_rows(self.cache, sequences + more[0], more[1])

    def _schedule(self) -> None:
        """Remove aborted requests, and begin the oldest waiting one if it fits into memory."""
        for one in self._queue.take_aborted():
            self._end(one, None, "aborted")
        used = self.cache.resources.budget.used  # less than before where a stored prefix has gone
        may_begin = self._reader.handle is None and (not self._full or used < self._full_bytes)
        handle = self._queue.first() if may_begin else None
        if handle is None:
            return
        with self._errors_of(handle):
            chunk = chunk_of(handle.request, self.chunk, self.cache)
            if self._owns_cache and not self.room.fits(self, handle, chunk):
                self._full, self._full_bytes = True, self.cache.resources.budget.used
                return
            self._begin_prompt(handle, chunk)
        self._queue.remove(handle)

    def _begin_prompt(self, handle: Handle, chunk: int) -> None:
        request = handle.request
        self._attach()
        if not self._running:  # requests may join later, so an own cache's steps may have several sequences
            self._decoder.begin_answer(2 if self._owns_cache else len(request.token_ids))
        if self._owns_cache and request.streamer is not None:
            with modes.callers():
                request.streamer.put(request.state.input_ids.cpu())
        self._reader.begin(handle, chunk)

    def _prefill_chunk(self) -> None:
        """Prefill one chunk of the current prompt. After the last, choose the first tokens."""
        handle = self._reader.handle
        if handle is None:
            return
        with self._errors_of(handle):
            logits = self._reader.next_chunk()
            if logits is None:
                return
            self.cache.counters.first_token_s = self.cache.counters.prefill_s
            run = SampledRun(handle.request, handle.request.sequences, logits)
            self._running[handle] = run
            run.sample()

    def _decode(self) -> None:
        """Decode one token of every running request (Algorithms 2 and 3)."""
        BatchStep(self._decoder, self._running, self._errors_of, self._end).decode()

    def _finish(self) -> None:
        """End the requests whose sequences have all finished."""
        for handle, run in list(self._running.items()):
            if isinstance(run, SampledRun) and not run.active:
                self._end(handle, None)

    @contextmanager
    def _errors_of(self, handle: Handle) -> Iterator[None]:
        """End only this request if the block raises. Raise again in `run` and for Ctrl-C."""
        try:
            with tokens_kept_on_error(self.cache, handle.request.planned, handle.request.state.new_token_ids):
                yield
        except BaseException as error:
            if self._owns_cache:
                clear_frames(error.__traceback__)  # the caller may keep the error: it must not keep memory
            self._end(handle, error)
            if not (self._owns_cache and isinstance(error, Exception)):
                raise

    def _end(self, handle: Handle, error: BaseException | None, reason: str | None = None) -> None:
        """Remove a request, free its sequences in an own cache, and wake waiting threads."""
        if handle.done:
            return
        if error is not None:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
        request = handle.request
        self._queue.remove(handle)
        self._running.pop(handle, None)
        self._full = False
        reasons: list[str | None] = [reason] * len(request.token_ids)
        with ExitStack() as stack:
            own = self._owns_cache  # else the caller gets the error raised, and ends the streamer
            stack.callback(lambda: handle.finish(error if own else None, reasons, request.streamer if own else None))
            if own:
                stack.callback(free, self.cache, handle, error)
            self._reader.stop(handle, keeps=error is None and handle.reuse is not None)
            for index, sequence in enumerate(request.sequences):
                if reason is not None and request.state.unfinished[index]:
                    sequence.finish_reason = reason
                reasons[index] = sequence.finish_reason

    def _using_cache(self, name: str) -> AbstractContextManager[None]:
        return self.cache.in_use.by(name) if self._owns_cache else nullcontext()

    def _attach(self) -> None:
        if self._owns_cache and self._attached is None:
            self._attached = ExitStack()
            self._attached.enter_context(attached(self._model))

    def _detach(self) -> None:
        stack = self.__dict__.get("_attached")  # absent if creating the cache failed
        self._attached = None
        if stack is not None:
            stack.close()
