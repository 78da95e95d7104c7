"""Checkpoints: copies of a sequence's sliding windows at earlier lengths, for going back to them.

A window drops every token that leaves it. Without checkpoints, a hybrid model that goes back
further than one token would have to prefill everything again. The full-attention layers keep their
rows and need no checkpoints. Checkpoints are spare: they are dropped when memory is short.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from specache.cache.window_layer import WindowLayer
from specache.errors import SessionError, SpeCacheError
from specache.platform.budget import ByteBudget, SpareClaim

FINE = 256  # least tokens between checkpoints near the end of a sequence, where most edits are
COARSE = 1024  # least tokens between checkpoints further back
RECENT = 2  # coarse distances from the end that count as near the end

Claims = tuple[SpareClaim, ...]


@dataclass(frozen=True)
class Spacing:
    """The lengths at which a sequence gets checkpoints, and which of them to keep.

    Distances are at least the longest window.

    Attributes:
        shortest, longest: the model's shortest and longest sliding window, in tokens.
    """

    shortest: int
    longest: int

    @classmethod
    def of(cls, windows: Iterable[int]) -> Spacing:
        lengths = sorted(windows)
        return cls(lengths[0], lengths[-1])

    @property
    def fine(self) -> int:
        return max(self.longest, FINE)

    @property
    def coarse(self) -> int:
        return max(self.longest, COARSE)

    def due_in_prompt(self, start: int, stop: int, total: int) -> list[int]:
        """Return the lengths in `(start, stop]` of checkpoints of a prompt of `total` tokens.

        They are multiples of the coarse distance, near the end those of the fine one, and the end.
        """
        recent = max(start, total - RECENT * self.coarse)
        due = {*_multiples(self.coarse, start, stop), *_multiples(self.fine, recent, stop)}
        return sorted({*due, total} if stop == total else due)

    def due_in_answer(self, length: int) -> bool:
        """Return whether an answer that has reached `length` tokens gets a checkpoint."""
        return length % self.fine == 0

    def dispensable(self, lengths: Sequence[int], total: int) -> int | None:
        """Return the index of a checkpoint that the spacing does not need, or `None`.

        Args:
            lengths: lengths of all checkpoints, ascending.
            total: tokens of the sequence.
        """
        for index, (before, length, after) in enumerate(zip([0, *lengths], lengths, lengths[1:], strict=False)):
            near_end = total - length < RECENT * self.coarse
            if after - before <= (self.fine if near_end else self.coarse):
                return index
        return None

    def least_valuable(self, lengths: Sequence[int], total: int) -> int:
        """Return the index of the checkpoint whose loss costs least. Never the last of several.

        The cost is the gap left, divided by the distance from the end.
        """
        if len(lengths) == 1:
            return 0
        gaps = [after - before for before, after in zip([0, *lengths[:-2]], lengths[1:], strict=True)]
        costs = [gap / (max(total - length, 0) + self.coarse) for gap, length in zip(gaps, lengths, strict=False)]
        return costs.index(min(costs))

    def reach(self, checkpoint: int, length: int) -> int | None:
        """Return how many of the first `length` tokens one of `checkpoint` tokens restores.

        `None` if it restores none. The ring of n tokens also serves a sequence of n - 1, and any
        shorter one as long as no token has left the ring.
        """
        usable = checkpoint - 1 <= length or checkpoint <= self.shortest
        return min(checkpoint, length) if usable else None

    def best(self, lengths: Sequence[int], length: int) -> int | None:
        """Return the index of the checkpoint that restores most of the first `length` tokens."""
        reached = [(reach, -index) for index, one in enumerate(lengths) if (reach := self.reach(one, length)) is not None]
        return -max(reached)[1] if reached else None


class PendingWindows:
    """A checkpoint in the making: rings at one length by layer, and the bytes claimed for them."""

    def __init__(self) -> None:
        self.rings: dict[int, Tensor] = {}
        self.claims: list[SpareClaim] = []
        self._windows: dict[int, int] = {}

    def add(self, layer: WindowLayer, ring: Tensor, claims: Claims) -> None:
        self.rings[layer.index] = ring
        self._windows[layer.index] = layer.window
        self.claims += claims

    def full_ring(self, layer: int) -> Tensor:
        """Return a layer's ring [2, Hkv, window, D], with zeros in unused slots."""
        ring = self.rings[layer].cpu()
        return pad(ring, (0, 0, 0, self._windows[layer] - ring.shape[2]))


class WindowCheckpoints(ABC):
    """The checkpoints of one sequence.

    In a prefill call `begin` before each pass, `capture` in each sliding layer, and `end` after the
    pass. Otherwise call `offer`.
    """

    def __init__(self, spacing: Spacing) -> None:
        self.spacing = spacing
        self._pending: dict[int, PendingWindows] = {}

    def begin(self, start: int, stop: int, total: int) -> None:
        """Begin a pass over tokens `[start, stop)` of a prompt of `total` tokens."""
        due = self.spacing.due_in_prompt(start, stop, total)
        self._pending = {length: PendingWindows() for length in due if self._wants(length)}

    def capture(self, layer: WindowLayer, keys: Tensor, values: Tensor) -> None:
        """Copy the due rings of a layer before it stores the pass's keys and values [Hkv, n, D]."""
        with self._locked():
            for length in sorted(self._pending, reverse=True):  # later ones are worth more
                claim = self._claim(layer.held_bytes) if length in self._pending else None
                if claim is None:
                    self._pending.pop(length, None)
                elif length in self._pending:
                    self._pending[length].add(layer, layer.ring_at(length, keys, values), claim)

    def end(self, length: int, most_bytes: int) -> None:
        """Keep the captured checkpoints after a pass, when the sequence has `length` tokens.

        Args:
            most_bytes: limit for all checkpoints together.

        Raises:
            SpeCacheError: they cannot be kept.
        """
        with self._locked():
            pending, self._pending = self._pending, {}
            for tokens, windows in pending.items():
                if windows.rings:
                    self._keep(tokens, windows)
            self._thin(length, most_bytes)

    def offer(self, length: int, windows: Mapping[int, WindowLayer], most_bytes: int) -> None:
        """Keep the current windows (by layer), after `length` tokens. Raises as `end` does.

        Not where the last token was dropped: they would not serve one token less, as others do.
        """
        if not windows or length == 0 or any(layer.written != length for layer in windows.values()):
            return
        with self._locked():
            if not self._wants(length):
                return
            pending = PendingWindows()
            for layer in windows.values():
                claim = self._claim(layer.held_bytes)
                if claim is None:
                    return
                pending.add(layer, layer.ring[:, :, : min(length, layer.window)].clone(), claim)
            self._keep(length, pending)
            self._thin(length, most_bytes)

    def newest(self, length: int) -> tuple[int, dict[int, Tensor]] | None:
        """Return length and rings of the checkpoint that restores most of `length` tokens.

        Its length may be `length` + 1 (see `Spacing.reach`); rings are by layer. A checkpoint whose
        file is damaged is dropped with a warning.
        """
        with self._locked():
            while (index := self.spacing.best(self.lengths, length)) is not None:
                try:
                    return self.lengths[index], self._rings(index)
                except SessionError as error:
                    self._drop(index)
                    warnings.warn(
                        f"A checkpoint of the sliding windows is damaged, so more tokens are read again. {error}",
                        UserWarning,
                        stacklevel=2,
                    )
        return None

    def reach(self, length: int) -> int:
        """Return how many of the first `length` tokens the best checkpoint restores; 0 if none."""
        with self._locked():
            lengths = self.lengths
            index = self.spacing.best(lengths, length)
            return 0 if index is None else self.spacing.reach(lengths[index], length) or 0

    def forget_after(self, length: int) -> None:
        """Drop the checkpoints behind `length`, where the sequence was truncated."""
        with self._locked():
            self._pending = {}
            for index in reversed([i for i, tokens in enumerate(self.lengths) if tokens > length]):
                self._drop(index)

    def forget_pending(self) -> None:
        """Drop the pending checkpoints of the current pass."""
        self._pending = {}

    def copy_into(self, other: MemoryCheckpoints, most: int) -> None:
        """Copy checkpoints to those of a fork: the last `most`, as far as they can be read.

        All of them, without copies, where both are in main memory.
        """
        for index in list(range(len(self.lengths)))[-most:]:
            with suppress(SpeCacheError):
                other.take(self.lengths[index], self._rings(index))

    def _thin(self, length: int, most_bytes: int) -> None:
        while (index := self.spacing.dispensable(self.lengths, length)) is not None:
            self._drop(index)
        while self.lengths and self.nbytes > most_bytes:
            self._drop(self.spacing.least_valuable(self.lengths, length))

    def _wants(self, length: int) -> bool:
        return length not in self.lengths

    def _locked(self) -> AbstractContextManager[None]:
        """Prevent other threads from dropping checkpoints inside the block."""
        return nullcontext()

    def _claim(self, size: int) -> Claims | None:
        """Claim `size` bytes of main memory; `None` where there is no room."""
        return ()

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Length of each checkpoint in tokens, ascending."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all checkpoints."""

    @abstractmethod
    def _keep(self, length: int, windows: PendingWindows) -> None:
        """Keep the windows of the first `length` tokens."""

    @abstractmethod
    def _rings(self, index: int) -> dict[int, Tensor]:
        """Return the rings of a checkpoint by layer."""

    @abstractmethod
    def _drop(self, index: int) -> None:
        """Drop a checkpoint."""


@dataclass(frozen=True)
class KeptWindows:
    """A checkpoint in main memory: rings of the first `tokens` tokens by layer. Forks share it."""

    tokens: int
    rings: dict[int, Tensor]
    claims: Claims

    @property
    def nbytes(self) -> int:
        return sum(ring.nbytes for ring in self.rings.values())


class MemoryCheckpoints(WindowCheckpoints):
    """Checkpoints in main memory.

    Args:
        budget: the budget that counts them as spare bytes; `None` where it bounds a GPU's memory
            instead.
    """

    def __init__(self, spacing: Spacing, budget: ByteBudget | None) -> None:
        super().__init__(spacing)
        self._budget = budget
        self._kept: list[KeptWindows] = []

    @property
    def lengths(self) -> list[int]:
        return [one.tokens for one in self._kept]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self._kept)

    def copy_into(self, other: MemoryCheckpoints, most: int) -> None:
        other._kept = list(self._kept)

    def take(self, length: int, rings: Mapping[int, Tensor]) -> None:
        """Add a checkpoint of `length` tokens with these rings (by layer), if there is room."""
        claim = self._claim(sum(ring.nbytes for ring in rings.values()))
        if claim is not None:
            self._kept.append(KeptWindows(length, dict(rings), claim))

    def copies(self) -> list[tuple[int, dict[int, Tensor]]]:
        """Return (length, rings by layer) of every checkpoint, which then may be dropped."""
        with self._locked():
            return [(one.tokens, one.rings) for one in self._kept]

    def give_up(self, size: int) -> None:
        """Drop checkpoints until `size` bytes of the budget are free (`budget.SpareHolder`)."""
        self._pending = {}
        assert self._budget is not None, "nothing was claimed of no budget"
        target = self._budget.spare - size
        while self._kept and self._budget.spare > target:
            self._drop(self.spacing.least_valuable(self.lengths, self.lengths[-1]))

    def _locked(self) -> AbstractContextManager[None]:
        """Lock the budget: a fork on another thread shares it and may call `give_up`."""
        return nullcontext() if self._budget is None else self._budget.locked()

    def _keep(self, length: int, windows: PendingWindows) -> None:
        one = KeptWindows(length, {index: ring.cpu() for index, ring in windows.rings.items()}, tuple(windows.claims))
        self._kept.append(one)
        self._kept.sort(key=lambda kept: kept.tokens)

    def _claim(self, size: int) -> Claims | None:
        """Claim bytes for a ring. Drop older checkpoints as needed, least valuable first."""
        if self._budget is None:
            return ()
        while (claim := self._budget.claim_spare(size, self)) is None and self._kept:
            self._drop(self.spacing.least_valuable(self.lengths, self.lengths[-1]))
        return None if claim is None else (claim,)

    def _rings(self, index: int) -> dict[int, Tensor]:
        return self._kept[index].rings

    def _drop(self, index: int) -> None:
        del self._kept[index]


def _multiples(step: int, after: int, to: int) -> range:
    """Return the multiples of `step` in `(after, to]`."""
    return range((after // step + 1) * step, to + 1, step)
