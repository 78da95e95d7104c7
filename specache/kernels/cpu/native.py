"""The C++ kernels (csrc/) behind the signatures of `specache.kernels.dispatch`: checks tensors and hands over their addresses.

Scores are integer dot products of codes with the query rounded to 8 bits, values are summed with the softmax weights of a page
rounded to 8 bits; everything else is float32. Only for tensors on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch  # before the extension: it brings the OpenMP runtime that both use
from torch import Tensor

from specache.config import PAGE_TOKENS, Code
from specache.errors import NonFiniteError
from specache.kernels.finite import all_finite
from specache.kernels.torch.rotated import rotation
from specache.kernels.types import LowBitKV, PageRun

_native: Any = None
MISSING: str | None = None
try:
    _native = importlib.import_module("specache._native")
except ImportError as error:  # installed without a compiler
    MISSING = str(error)

_FIELDS = {
    Code.KIVI: ("key_codes", "key_scale", "key_zero", "value_codes", "value_scale", "value_zero"),
    Code.ROTATED: ("key_codes", "key_scale", "key_mean", "value_codes", "value_scale", "value_scale"),
}
_CODES = {Code.KIVI: 0, Code.ROTATED: 1}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def instruction_sets() -> list[str]:
    """What the extension was built for and this processor runs, slowest first; empty without the extension."""
    return list(_native.available()) if _native is not None else []


@dataclass(frozen=True)
class RecentTokens:
    """The newest tokens of a sequence at 16 bits: keys and values [Hkv, r, D] of equal strides, the last dimension contiguous."""

    keys: Tensor
    values: Tensor


class NativeKernels:
    """The kernels of one instruction set."""

    def __init__(self, isa: str) -> None:
        self.isa = isa

    @staticmethod
    def serves(dim: int, dtype: torch.dtype) -> bool:
        """Whether layers of this head dimension and dtype are supported."""
        return dim <= _native.MAX_DIM and dtype in _DTYPES

    def quantise(self, keys: Tensor, values: Tensor, copy: LowBitKV, start: int) -> None:
        keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
        if not (all_finite(keys) and all_finite(values)):
            raise NonFiniteError("Keys or values to quantise hold NaN or infinity. Nothing was packed.")
        size = keys.itemsize
        strides = [stride * size for x in (keys, values) for stride in x.stride()[:2]]
        _native.quantise(
            self.isa,
            torch.get_num_threads(),
            _layout(copy),
            _copy(copy, copy.length),
            keys.data_ptr(),
            values.data_ptr(),
            strides,
            _DTYPES[keys.dtype],
            start,
            keys.shape[1],
        )

    def score(
        self, query: Tensor, copies: Sequence[LowBitKV], lengths: Sequence[int], scaling: float, softcap: float | None
    ) -> Tensor:
        batch, num_heads, n, _ = query.shape
        heads = copies[0].num_kv_heads
        groups = num_heads // heads
        query = query.float().contiguous()
        scores = torch.empty(batch, heads, groups, n, max(lengths), dtype=torch.float32)
        if scores.numel():
            _native.score(
                self.isa,
                torch.get_num_threads(),
                _layout_of(copies),
                [_copy(copy, length) for copy, length in zip(copies, lengths, strict=True)],
                query.data_ptr(),
                groups,
                n,
                scaling,
                softcap or 0.0,
                scores.data_ptr(),
                scores.shape[-1],
            )
        return scores

    def select(self, scores: Tensor, rest_lse: Tensor, lengths: Sequence[int], k: int) -> Tensor:
        batch, heads, groups, n, size = scores.shape
        k = min(k, size)
        positions = torch.empty(batch, heads, n, k, dtype=torch.int64)
        if positions.numel():
            scores, rest_lse = scores.contiguous(), rest_lse.float().contiguous()
            _native.select(
                self.isa,
                torch.get_num_threads(),
                list(lengths),
                heads,
                groups,
                n,
                scores.data_ptr(),
                size,
                rest_lse.data_ptr(),
                k,
                positions.data_ptr(),
            )
        return positions

    def rescore(
        self, query: Tensor, scores: Tensor, positions: Tensor, rows: Tensor, scaling: float, softcap: float | None
    ) -> None:
        batch, heads, groups, n, size = scores.shape
        if not positions.numel():
            return
        query, positions = query.float().contiguous(), positions.contiguous()
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        assert scores.is_contiguous()
        _native.rescore(
            self.isa,
            torch.get_num_threads(),
            batch,
            heads,
            query.shape[-1],
            query.data_ptr(),
            groups,
            n,
            scaling,
            softcap or 0.0,
            scores.data_ptr(),
            size,
            positions.data_ptr(),
            positions.shape[-1],
            rows.data_ptr(),
            _DTYPES[rows.dtype],
            _row_strides(rows),
        )

    def attend(
        self, scores: Tensor, positions: Tensor, rows: Tensor, copies: Sequence[LowBitKV], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        batch, heads, groups, n, size = scores.shape
        out = torch.empty(batch, heads, groups, n, copies[0].head_dim, dtype=torch.float32)
        lse = torch.empty(batch, heads, groups, n, dtype=torch.float32)
        positions = positions.contiguous()
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        assert scores.is_contiguous()
        _native.attend(
            self.isa,
            torch.get_num_threads(),
            _layout_of(copies),
            [_copy(copy, length) for copy, length in zip(copies, lengths, strict=True)],
            groups,
            n,
            scores.data_ptr(),
            size,
            positions.data_ptr(),
            positions.shape[-1],
            rows.data_ptr(),
            _DTYPES[rows.dtype],
            _row_strides(rows),
            out.data_ptr(),
            lse.data_ptr(),
        )
        return out, lse

    def decode_in_place(
        self,
        query: Tensor,
        copies: Sequence[LowBitKV],
        recent: Sequence[RecentTokens],
        stored: Sequence[Tensor],
        k: int,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """A layer of a step in one call: what `score`, `select`, `rescore`, `attend` and exact attention over the recent tokens
        give, each row with the pairs that it selects itself.

        Args:
            query: [B, Hq, n, D].
            recent: of which row `i` sees all but the last `n - 1 - i`.
            stored: per sequence the 16-bit rows [Hkv, capacity, 2 D], read where they lie.
            sinks: logits [Hq], or `None`.

        Returns:
            float32 [B, Hq, n, D].
        """
        return LayerStep(self.isa, query, copies, recent, k, scaling, softcap, sinks, at_once=True).run(stored)

    def layer_step(
        self,
        query: Tensor,
        copies: Sequence[LowBitKV],
        recent: Sequence[RecentTokens],
        k: int,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> LayerStep:
        """The same in three calls, where the rows of what was selected have to be fetched before the last."""
        return LayerStep(self.isa, query, copies, recent, k, scaling, softcap, sinks, at_once=False)


class LayerStep:
    """A layer of a step, to be used once: `run` if `at_once`, else `select`, `attend_copy` and `attend_fetched`.

    Both give the same to the bit where all rows are there.
    """

    def __init__(
        self,
        isa: str,
        query: Tensor,
        copies: Sequence[LowBitKV],
        recent: Sequence[RecentTokens],
        k: int,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        *,
        at_once: bool,
    ) -> None:
        query = query.float().contiguous()
        sinks = sinks if sinks is None else sinks.float().contiguous()
        self._held = query, copies, recent, sinks  # the step points into them
        self._shape = (len(copies), copies[0].num_kv_heads, query.shape[2], k)
        self._step = _native.LayerStep(
            isa,
            torch.get_num_threads(),
            _layout_of(copies),
            [_copy(copy, copy.length) for copy in copies],
            query.data_ptr(),
            query.shape[1] // copies[0].num_kv_heads,
            query.shape[2],
            scaling,
            softcap or 0.0,
            _recent_numbers(recent),
            _DTYPES[recent[0].keys.dtype],
            k,
            0 if sinks is None else sinks.data_ptr(),
            at_once,
        )

    def run(self, stored: Sequence[Tensor]) -> Tensor:
        """Attention over rows [Hkv, capacity, 2 D] per sequence that are read where they lie -> float32 [B, Hq, n, D]."""
        out, size = torch.empty_like(self._held[0]), stored[0].itemsize
        numbers = [n for rows in stored for n in (rows.data_ptr(), rows.stride(0) * size, rows.stride(1) * size)]
        self._step.run(numbers, _DTYPES[stored[0].dtype], out.data_ptr())
        return out

    def select(self) -> Tensor:
        """Each row's positions [B, Hkv, n, k], ascending, padded with -1."""
        positions = torch.empty(self._shape, dtype=torch.int64)
        self._step.select(positions.data_ptr())
        return positions

    def attend_copy(self, positions: Tensor) -> None:
        """Attend to the copy without the pairs at `positions` [B, Hkv, n, k] (-1: none); their rows are not needed yet."""
        positions = positions.contiguous()
        self._step.attend_copy(positions.data_ptr(), positions.shape[-1])

    def attend_fetched(self, positions: Tensor, rows: Tensor) -> Tensor:
        """Attention with the rows [B, Hkv, n, k, 2 D] of the same positions in place of those pairs -> float32 [B, Hq, n, D]."""
        positions = positions.contiguous()
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        out = torch.empty_like(self._held[0])
        self._step.attend_fetched(
            positions.data_ptr(), positions.shape[-1], rows.data_ptr(), _DTYPES[rows.dtype], _row_strides(rows), out.data_ptr()
        )
        return out


def _recent_numbers(recent: Sequence[RecentTokens]) -> list[int]:
    """Addresses of keys and values, count, and bytes from one KV head and token to the next, per sequence."""
    numbers: list[int] = []
    for tokens in recent:
        head, token, _ = tokens.keys.stride()
        size = tokens.keys.itemsize
        numbers += [tokens.keys.data_ptr(), tokens.values.data_ptr(), tokens.keys.shape[1], head * size, token * size]
    return numbers


def _row_strides(rows: Tensor) -> list[int]:
    """Bytes from one sequence, KV head, row and slot to the next, of rows [B, Hkv, n, k, 2 D]."""
    return [stride * rows.itemsize for stride in rows.stride()[:4]]


def _copy(copy: LowBitKV, length: int) -> Any:
    parts = [run.addresses for run in copy.runs]
    pages = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    weights = 0 if copy.key_weights is None else copy.key_weights.data_ptr()
    return _native.Copy(pages, length, weights)


def _layout_of(copies: Sequence[LowBitKV]) -> Any:
    return _layout(next((copy for copy in copies if copy.runs), copies[0]))


def _layout(copy: LowBitKV) -> Any:
    offsets = _offsets(copy.runs[0], copy.code) if copy.runs else (0,) * 6
    return _native_layout(copy.code, copy.bits, copy.group_size, copy.num_kv_heads, copy.head_dim, offsets)


def _offsets(run: PageRun, code: Code) -> tuple[int, ...]:
    """Bytes from a page's start to each of its fields."""
    start = int(run.fields["key_codes"].storage_offset())
    return tuple(int(run.fields[name].storage_offset()) * run.fields[name].itemsize - start for name in _FIELDS[code])


@lru_cache(maxsize=64)
def _native_layout(code: Code, bits: int, group_size: int, heads: int, dim: int, offsets: tuple[int, ...]) -> Any:
    assert PAGE_TOKENS == 64, "csrc/layout.hpp"
    return _native.Layout(_CODES[code], bits, group_size, heads, dim, min(group_size, dim), list(offsets), _signs(dim))


def _signs(dim: int) -> list[float]:
    """The rotation's random signs: its columns are those of Hadamard matrices times a sign, whose first row is positive."""
    matrix = rotation(dim, torch.device("cpu"))
    first = (matrix != 0).int().argmax(0)  # the first row of each column's block
    return matrix[first, torch.arange(dim, device=matrix.device)].sign().tolist()
