"""Triton's kernels with a fallback to PyTorch's, in case one of them cannot be built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from specache.kernels.torch import operations as torch_ops
from specache.kernels.types import LowBitKV


class GuardedKernels:
    """The kernels of one GPU. After the first build error, PyTorch's kernels run all operations.

    Only errors of compiling or loading are caught. They come before the kernel runs, so its
    arguments are intact and PyTorch can start over. `attend` is the exception: it launches several
    kernels, the first of which destroys the scores. Until it has succeeded once for a kind of
    layer, it works on a copy of them.

    Args:
        build_errors: exceptions of a kernel that was not built or not loaded.
        give_up: called once, with the error.
    """

    def __init__(self, backend: Any, build_errors: tuple[type[Exception], ...], give_up: Callable[[Exception], None]) -> None:
        self._backend = backend
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
        self, scores: Tensor, positions: Tensor, kv_rows: Tensor, low_bit_kvs: Sequence[LowBitKV], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        one, groups, n = low_bit_kvs[0], scores.shape[2], scores.shape[3]
        kind = (one.code, one.bits, one.group_size, one.head_dim, groups, n, kv_rows.dtype, positions.shape[-1] > 0)
        if kind in self._have_attended:
            return self._backend.attend(scores, positions, kv_rows, low_bit_kvs, lengths)
        try:
            result = self._backend.attend(scores.clone(), positions, kv_rows, low_bit_kvs, lengths)
        except self._build_errors as error:
            self._fall_back(error)
            return torch_ops.attend(scores, positions, kv_rows, low_bit_kvs, lengths)
        self._have_attended.add(kind)
        return result

    def _run(self, operation: str, *arguments: Any) -> Any:
        try:
            return getattr(self._backend, operation)(*arguments)
        except self._build_errors as error:
            self._fall_back(error)
        return getattr(torch_ops, operation)(*arguments)

    def _fall_back(self, error: Exception) -> None:
        self._backend = torch_ops
        self._give_up(error)
