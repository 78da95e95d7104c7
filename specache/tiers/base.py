"""The interface of a slow tier: storage for the 16-bit rows of one sequence.

A row is `[K | V]` of one token and one KV head: `2 D` contiguous elements in the model's dtype, on
the CPU. Rows of a head lie in token order. Keys are stored after RoPE. One thread writes; `gather`
may be called from any thread meanwhile. Storage failures raise `SlowTierError`; a failed write
leaves the tier unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from specache.tiers.layer_rows import LayerRows
from specache.tiers.transfer import Transferred, on_host
from specache.tiers.worker import PrefetchWorker


class Fetch:
    """A read of rows [M, 2 D] of one layer that is under way. Call `wait` once, or `cancel`.

    The system reads (`arrived` is given), or a thread (`read_in_thread`), or else `wait` itself. If
    neither `wait` nor `cancel` is called, the memory being read into lives until the reads have
    ended.

    Args:
        read: returns the rows on the CPU, waiting for those that the system reads. It does not
            refer to the hot set, which may be freed meanwhile.
        arrived: returns True if `read` would not block.
        end: discards what the system reads.

    Attributes:
        positions: int64 [Hkv, k] of the rows, in their order, -1 where none is read.
        transfer: starts to copy the rows to the device, right after they were read.
        read_s: seconds that the read took. The system reports no completion time, so of its reads
            these are the seconds in which one was observed running. Submitting is not included.
        wait_s: seconds of `read_s` in which the step waited.
    """

    positions: Tensor

    def __init__(
        self, read: Callable[[], Tensor], arrived: Callable[[], bool] | None = None, end: Callable[[], None] | None = None
    ) -> None:
        self.transfer: Callable[[Tensor], Transferred] = on_host
        self.read_s = self.wait_s = 0.0
        self._read, self._arrived, self._end = read, arrived, end
        self._future: Future[tuple[Transferred, float]] | None = None
        self._begun = self._running = time.perf_counter()  # `running`: when it was last observed running

    def read_in_thread(self, worker: PrefetchWorker) -> bool:
        """Have a thread read and transfer the rows; return False if the worker's queue is full."""
        self._future = worker.submit(partial(_timed, self._read, self.transfer))
        return self._future is not None

    @property
    def done(self) -> bool:
        """Return True if `wait` would not block."""
        return self._future.done() if self._future else self._arrived is not None and self._arrived()

    def poll(self) -> None:
        """Record whether the system is still reading."""
        if self._arrived is not None and not self._arrived():
            self._running = time.perf_counter()

    def wait(self) -> Tensor:
        """Return the rows, safe to use on the current stream. Raise what the read raised.

        The host waits for the read, never for the device. A read that no thread has begun is done
        here.
        """
        self.poll()
        done, asked = self.done, time.perf_counter()
        try:
            if self._future is None or self._future.cancel():
                transferred, seconds = _timed(self._read, self.transfer)
                self.wait_s += seconds
                self.read_s = self._running - self._begun + self.wait_s
            else:
                transferred, self.read_s = self._future.result()
                self.wait_s = 0.0 if done else time.perf_counter() - asked
        except BaseException:  # also an interrupt of the wait
            self.cancel()
            raise
        return transferred()

    def cancel(self) -> None:
        """Discard the read. The result or error of a thread that runs it is ignored."""
        if self._future is not None:
            self._future.cancel()
        if self._end is not None:
            self._end()


def _timed(read: Callable[[], Tensor], transfer: Callable[[Tensor], Transferred]) -> tuple[Transferred, float]:
    """Read rows and start their transfer; return them and the seconds it took."""
    started = time.perf_counter()
    transferred = transfer(read())
    return transferred, time.perf_counter() - started


class StepReads(Protocol):
    """The rows of one layer on their way into a hot set, in C++.

    Attributes:
        native: the C++ object.
    """

    native: Any


class SlowTier(Protocol):
    """The 16-bit rows of one sequence, for all its full-attention layers."""

    in_place: bool  # attention reads the rows where they lie, so nothing is prefetched
    in_memory: bool  # the rows lie in main memory, where `rows` returns them

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [Hkv, n, D] of tokens `[start, start + n)`; forget later tokens."""

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [Hkv, stop - start, D] of a range of tokens. Do not write to them:
        they may be views of the tier's memory.
        """

    def rows(self, layer: int, used: int = 0, needed: int = 0) -> LayerRows:
        """Return a layer's rows, with tokens `[used, needed)` ready to be written in place.

        Only of a tier that is `in_memory`.
        """

    def gather(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        """Return rows [M, 2 D] of M (KV head, position) pairs, in their order."""

    def begin(self, layer: int, heads: Tensor, positions: Tensor) -> Fetch | None:
        """Start to gather rows and return at once; None if that would take a thread.

        Rows in memory are copied by `Fetch.wait`.
        """

    def has_room(self, layer: int, length: int) -> bool:
        """Return whether kernels may store the next token of a layer of `length` tokens themselves.

        They store it in the layer's memory, and `count_appended` counts it.
        """

    def count_appended(self, layer: int) -> None:
        """Count a token that kernels have stored."""

    def step_reads(self, layer: int, hot: Any, before: StepReads | None) -> StepReads | None:
        """Return what reads a layer's rows into a hot set inside a kernel's step.

        Args:
            hot: the hot set's C++ object.
            before: the result of the last call with this hot set; it is updated and returned where
                that is possible.

        Returns:
            `None` where rows lie in memory, or take a thread to read.
        """

    def reserve(self, tokens: int) -> None:
        """Prepare for a sequence of this many tokens."""

    def truncate_memory(self, layer: int, length: int) -> None:
        """Free main memory that only a layer's tokens from `length` on need."""

    def fork(self) -> SlowTier:
        """Return an independent copy. It shares what neither writes to."""

    @property
    def nbytes(self) -> int:
        """Return the bytes allocated. What is shared with forks counts in full."""

    def close(self) -> None:
        """Free everything. The tier is then empty and may be filled again."""
