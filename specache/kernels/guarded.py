"""Triton's kernels with PyTorch's behind them, for the day that one of them cannot be built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from specache.kernels.torch import operations as torch_ops
from specache.kernels.types import LowBitKV


class GuardedKernels:
    """The kernels of one GPU. The first that cannot be compiled or loaded makes PyTorch serve everything from then on.

    Only such errors are caught: they come before the kernel runs, so that its arguments are whole and PyTorch can start over.
    `attend` is the exception, several kernels of which the first destroys the scores; until it has run once for a kind of layer it
    works on a copy of them.

    Args:
        build_errors: exceptions that mean that a kernel was not built or not loaded.
        give_up: called once, with the error.
    """

    def __init__(self, backend: Any, build_errors: tuple[type[Exception], ...], give_up: Callable[[Exception], None]) -> None:
        self._serving = backend
        self._build_errors = build_errors
        self._give_up = give_up
        self._have_attended: set[tuple[object, ...]] = set()

    def quantise(self, *arguments: Any) -> None:
        self._run("quantise", *arguments)

    def score(self, *arguments: Any) -> Tensor:
        return self._run("score", *arguments)

    def rescore(self, *arguments: Any) -> None:
        self._run("rescore", *arguments)

    def select(self, *arguments: Any) -> Tensor:
        return self._run("select", *arguments)

    def attend(
        self, scores: Tensor, positions: Tensor, rows: Tensor, copies: Sequence[LowBitKV], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        one, groups, n = copies[0], scores.shape[2], scores.shape[3]
        kind = (one.code, one.bits, one.group_size, one.head_dim, groups, n, rows.dtype, positions.shape[-1] > 0)
        if kind in self._have_attended:
            return self._serving.attend(scores, positions, rows, copies, lengths)
        try:
            result = self._serving.attend(scores.clone(), positions, rows, copies, lengths)
        except self._build_errors as error:
            self._hand_over(error)
            return torch_ops.attend(scores, positions, rows, copies, lengths)
        self._have_attended.add(kind)
        return result

    def _run(self, operation: str, *arguments: Any) -> Any:
        try:
            return getattr(self._serving, operation)(*arguments)
        except self._build_errors as error:
            self._hand_over(error)
        return getattr(torch_ops, operation)(*arguments)

    def _hand_over(self, error: Exception) -> None:
        self._serving = torch_ops
        self._give_up(error)
