"""Copies of a sequence's sliding windows at earlier lengths, from which it goes on after it was cut.

A window forgets every token that leaves it, so a hybrid model that goes back further than one token would read everything again.
The full-attention layers keep their rows, and need no copies. Copies are spare: they are given up where memory is short.
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

FINE = 256  # tokens between two checkpoints near the end of a sequence, where most edits are; a window at least
COARSE = 1024  # the same further back
RECENT = 2  # times the coarse distance is near the end

Claims = tuple[SpareClaim, ...]


@dataclass(frozen=True)
class Spacing:
    """Where checkpoints of a sequence are.

    Attributes:
        shortest, longest: sliding windows of the model, in tokens.
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
        """Lengths in `(start, stop]` at which a prompt of `total` tokens gets checkpoints: multiples of the coarse distance, near
        the end of the fine one, and the end.
        """
        recent = max(start, total - RECENT * self.coarse)
        due = {*_multiples(self.coarse, start, stop), *_multiples(self.fine, recent, stop)}
        return sorted({*due, total} if stop == total else due)

    def due_in_answer(self, length: int) -> bool:
        """Whether an answer that has just come to `length` tokens gets one."""
        return length % self.fine == 0

    def dispensable(self, lengths: Sequence[int], total: int) -> int | None:
        """Index of a checkpoint between whose neighbours there is no more than the distance that there may be, or `None`.

        Args:
            lengths: of all checkpoints, the shortest first.
            total: tokens of the sequence.
        """
        for index, (before, length, after) in enumerate(zip([0, *lengths], lengths, lengths[1:], strict=False)):
            near_end = total - length < RECENT * self.coarse
            if after - before <= (self.fine if near_end else self.coarse):
                return index
        return None

    def least_valuable(self, lengths: Sequence[int], total: int) -> int:
        """Index of the checkpoint whose loss costs least: gaps are worse near the end. Never the last of several."""
        if len(lengths) == 1:
            return 0
        gaps = [after - before for before, after in zip([0, *lengths[:-2]], lengths[1:], strict=True)]
        costs = [gap / (max(total - length, 0) + self.coarse) for gap, length in zip(gaps, lengths, strict=False)]
        return costs.index(min(costs))

    def reach(self, checkpoint: int, length: int) -> int | None:
        """How many of the first `length` tokens a checkpoint of `checkpoint` tokens brings back; `None` if it is of no use.

        A ring of n tokens has also what a sequence of n - 1 sees next, and everything before, as long as no token has left it.
        """
        serves = checkpoint - 1 <= length or checkpoint <= self.shortest
        return min(checkpoint, length) if serves else None

    def best(self, lengths: Sequence[int], length: int) -> int | None:
        """Index of the checkpoint that brings back most of the first `length` tokens."""
        reached = [(reach, -index) for index, one in enumerate(lengths) if (reach := self.reach(one, length)) is not None]
        return -max(reached)[1] if reached else None


class PendingWindows:
    """Rings at one length, by layer, as they come; and the bytes that are held for them."""

    def __init__(self) -> None:
        self.rings: dict[int, Tensor] = {}
        self.claims: list[SpareClaim] = []
        self._windows: dict[int, int] = {}

    def add(self, layer: WindowLayer, ring: Tensor, claims: Claims) -> None:
        self.rings[layer.index] = ring
        self._windows[layer.index] = layer.window
        self.claims += claims

    def whole(self, layer: int) -> Tensor:
        """A layer's ring [2, Hkv, window, D], with zeros in slots that no token has used."""
        ring = self.rings[layer].cpu()
        return pad(ring, (0, 0, 0, self._windows[layer] - ring.shape[2]))


class WindowCheckpoints(ABC):
    """The checkpoints of one sequence.

    While a prompt is prefilled: `begin` before each pass, `capture` in each sliding layer, `end` after it. Else: `offer`.
    """

    def __init__(self, spacing: Spacing) -> None:
        self.spacing = spacing
        self._pending: dict[int, PendingWindows] = {}

    def begin(self, start: int, stop: int, total: int) -> None:
        """A pass over tokens `[start, stop)` of a prompt of `total` begins."""
        due = self.spacing.due_in_prompt(start, stop, total)
        self._pending = {length: PendingWindows() for length in due if self._wants(length)}

    def capture(self, layer: WindowLayer, keys: Tensor, values: Tensor) -> None:
        """A sliding layer is about to store the pass's keys and values [Hkv, n, D]."""
        with self._alone():
            for length in sorted(self._pending, reverse=True):  # where there is no room for all, the last ones are worth most
                claim = self._claim(layer.nbytes) if length in self._pending else None
                if claim is None:
                    self._pending.pop(length, None)
                elif length in self._pending:
                    self._pending[length].add(layer, layer.ring_at(length, keys, values), claim)

    def end(self, length: int, most_bytes: int) -> None:
        """The pass is through every layer, and the sequence has `length` tokens.

        Args:
            most_bytes: that all checkpoints may take.

        Raises:
            SpeCacheError: they cannot be kept.
        """
        with self._alone():
            pending, self._pending = self._pending, {}
            for tokens, windows in pending.items():
                if windows.rings:
                    self._keep(tokens, windows)
            self._thin(length, most_bytes)

    def offer(self, length: int, windows: Mapping[int, WindowLayer], most_bytes: int) -> None:
        """Keep the windows (by layer) as they are now, after `length` tokens. Raises as `end`."""
        if not windows or length == 0:
            return
        with self._alone():
            if not self._wants(length):
                return
            copies = PendingWindows()
            for layer in windows.values():
                claim = self._claim(layer.nbytes)
                if claim is None:
                    return
                copies.add(layer, layer.ring[:, :, : min(length, layer.window)].clone(), claim)
            self._keep(length, copies)
            self._thin(length, most_bytes)

    def newest(self, length: int) -> tuple[int, dict[int, Tensor]] | None:
        """The checkpoint that brings back most of the first `length` tokens: its own tokens (one more than `length`, perhaps; see
        `Spacing.reach`), and its rings by layer. One whose file is damaged is forgotten with a warning: it is spare.
        """
        with self._alone():
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

    def forget_after(self, length: int) -> None:
        """Tokens from `length` on are gone, and with them the checkpoints behind."""
        with self._alone():
            self._pending = {}
            for index in reversed([i for i, tokens in enumerate(self.lengths) if tokens > length]):
                self._drop(index)

    def forget_pending(self) -> None:
        """Do without those of the pass that is under way."""
        self._pending = {}

    def copy_into(self, other: MemoryCheckpoints, most: int) -> None:
        """Have the checkpoints of a copy of the sequence hold those of this one: all of them where both lie in main memory, else
        copies of the last `most`, as far as they can be read.
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

    def _alone(self) -> AbstractContextManager[None]:
        """Inside, nobody else takes checkpoints away."""
        return nullcontext()

    def _claim(self, size: int) -> Claims | None:
        """Room for `size` bytes in main memory; `None` where there is none."""
        return ()

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens of each checkpoint, the shortest first."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all of them."""

    @abstractmethod
    def _keep(self, length: int, windows: PendingWindows) -> None:
        """Keep the windows of the first `length` tokens."""

    @abstractmethod
    def _rings(self, index: int) -> dict[int, Tensor]:
        """The rings of a checkpoint, by layer."""

    @abstractmethod
    def _drop(self, index: int) -> None:
        """Forget a checkpoint."""


@dataclass(frozen=True)
class KeptWindows:
    """The rings of the first `tokens` tokens, by layer, in main memory; sequences that were forked share them."""

    tokens: int
    rings: dict[int, Tensor]
    claims: Claims

    @property
    def nbytes(self) -> int:
        return sum(ring.nbytes for ring in self.rings.values())


class MemoryCheckpoints(WindowCheckpoints):
    """Checkpoints in main memory.

    Args:
        budget: where they are spare bytes; `None` where main memory is not what it bounds (a GPU's is).
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
        """Keep rings (by layer) that somebody read of the first `length` tokens, if there is room."""
        claim = self._claim(sum(ring.nbytes for ring in rings.values()))
        if claim is not None:
            self._kept.append(KeptWindows(length, dict(rings), claim))

    def give_up(self, size: int) -> None:
        """Forget checkpoints until `size` bytes of the budget are free (`budget.SpareHolder`)."""
        self._pending = {}
        assert self._budget is not None, "nothing was claimed of no budget"
        target = self._budget.spare - size
        while self._kept and self._budget.spare > target:
            self._drop(self.spacing.least_valuable(self.lengths, self.lengths[-1]))

    def _alone(self) -> AbstractContextManager[None]:
        """A fork on another thread, which has the same budget, may need their bytes at any time (`give_up`)."""
        return nullcontext() if self._budget is None else self._budget.locked()

    def _keep(self, length: int, windows: PendingWindows) -> None:
        one = KeptWindows(length, {index: ring.cpu() for index, ring in windows.rings.items()}, tuple(windows.claims))
        self._kept.append(one)
        self._kept.sort(key=lambda kept: kept.tokens)

    def _claim(self, size: int) -> Claims | None:
        """Room for a ring, for which checkpoints go that are worth less than a new one."""
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
    """Multiples of `step` in `(after, to]`."""
    return range((after // step + 1) * step, to + 1, step)
