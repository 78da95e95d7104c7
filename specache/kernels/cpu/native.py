"""The C++ kernels (csrc/) with the signatures of `specache.kernels.dispatch`.

This file checks tensors and passes their addresses. Scores are integer dot products of codes with
the query rounded to 8 bits; values are summed with the softmax weights of a page rounded to 8 bits;
everything else is float32. Only for tensors on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch  # before the extension: it loads the OpenMP runtime that both use
from torch import Tensor

from specache.config import PAGE_TOKENS, Code
from specache.errors import NonFiniteError
from specache.kernels.finite import all_finite
from specache.kernels.torch.rotated import rotation
from specache.kernels.types import LowBitKV, PageRun

_native: Any = None
IMPORT_ERROR: str | None = None  # why the extension could not be imported
try:
    _native = importlib.import_module("specache._native")
except ImportError as error:  # installed without a compiler
    IMPORT_ERROR = str(error)

_FIELDS = {
    Code.KIVI: ("key_codes", "key_scale", "key_zero", "value_codes", "value_scale", "value_zero"),
    Code.ROTATED: ("key_codes", "key_scale", "key_mean", "value_codes", "value_scale", "value_scale"),
}
_CODES = {Code.KIVI: 0, Code.ROTATED: 1}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def instruction_sets() -> list[str]:
    """Return the instruction sets of the extension that this processor runs, slowest first.

    Empty without the extension.
    """
    return list(_native.available()) if _native is not None else []


@dataclass(frozen=True)
class RecentTokens:
    """The newest tokens of a sequence at 16 bits: keys and values [Hkv, r, D].

    Both have equal strides and a contiguous last dimension.
    """

    keys: Tensor
    values: Tensor


class NativeKernels:
    """The kernels of one instruction set."""

    def __init__(self, isa: str) -> None:
        self.isa = isa

    @staticmethod
    def supports(dim: int, dtype: torch.dtype) -> bool:
        """Return whether layers of this head dimension and dtype are supported."""
        return dim <= _native.MAX_DIM and dtype in _DTYPES

    def quantise(self, keys: Tensor, values: Tensor, low_bit_kv: LowBitKV, start: int) -> None:
        keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
        if not (all_finite(keys) and all_finite(values)):
            raise NonFiniteError("Keys or values to quantise hold NaN or infinity. Nothing was packed.")
        size = keys.itemsize
        strides = [stride * size for x in (keys, values) for stride in x.stride()[:2]]
        _native.quantise(
            self.isa,
            torch.get_num_threads(),
            _layout(low_bit_kv),
            _native_kv(low_bit_kv, low_bit_kv.length),
            keys.data_ptr(),
            values.data_ptr(),
            strides,
            _DTYPES[keys.dtype],
            start,
            keys.shape[1],
        )

    def score(
        self, query: Tensor, low_bit_kvs: Sequence[LowBitKV], lengths: Sequence[int], scaling: float, softcap: float | None
    ) -> Tensor:
        batch, num_heads, n, _ = query.shape
        heads = low_bit_kvs[0].num_kv_heads
        groups = num_heads // heads
        query = query.float().contiguous()
        scores = torch.empty(batch, heads, groups, n, max(lengths), dtype=torch.float32)
        if scores.numel():
            _native.score(
                self.isa,
                torch.get_num_threads(),
                _layout_of(low_bit_kvs),
                [_native_kv(low_bit_kv, length) for low_bit_kv, length in zip(low_bit_kvs, lengths, strict=True)],
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
        self, query: Tensor, scores: Tensor, positions: Tensor, kv_rows: Tensor, scaling: float, softcap: float | None
    ) -> None:
        batch, heads, groups, n, size = scores.shape
        if not positions.numel():
            return
        query, positions = query.float().contiguous(), positions.contiguous()
        kv_rows = kv_rows if kv_rows.stride(-1) == 1 else kv_rows.contiguous()
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
            kv_rows.data_ptr(),
            _DTYPES[kv_rows.dtype],
            _kv_row_strides(kv_rows),
        )

    def attend(
        self, scores: Tensor, positions: Tensor, kv_rows: Tensor, low_bit_kvs: Sequence[LowBitKV], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        batch, heads, groups, n, size = scores.shape
        out = torch.empty(batch, heads, groups, n, low_bit_kvs[0].head_dim, dtype=torch.float32)
        lse = torch.empty(batch, heads, groups, n, dtype=torch.float32)
        positions = positions.contiguous()
        kv_rows = kv_rows if kv_rows.stride(-1) == 1 else kv_rows.contiguous()
        assert scores.is_contiguous()
        _native.attend(
            self.isa,
            torch.get_num_threads(),
            _layout_of(low_bit_kvs),
            [_native_kv(low_bit_kv, length) for low_bit_kv, length in zip(low_bit_kvs, lengths, strict=True)],
            groups,
            n,
            scores.data_ptr(),
            size,
            positions.data_ptr(),
            positions.shape[-1],
            kv_rows.data_ptr(),
            _DTYPES[kv_rows.dtype],
            _kv_row_strides(kv_rows),
            out.data_ptr(),
            lse.data_ptr(),
        )
        return out, lse

    def decode_in_place(
        self,
        query: Tensor,
        low_bit_kvs: Sequence[LowBitKV],
        recent: Sequence[RecentTokens],
        stored: Sequence[Tensor],
        k: int,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Compute the attention of a layer in one call, each query with the pairs that it selects.

        It combines `score`, `select`, `rescore`, `attend` and exact attention over the recent
        tokens.

        Args:
            query: [B, Hq, n, D].
            recent: recent tokens per sequence; query `i` sees all but the last `n - 1 - i`.
            stored: per sequence the 16-bit rows [Hkv, capacity, 2 D], which are read in place.
            sinks: logits [Hq], or `None`.

        Returns:
            float32 [B, Hq, n, D].
        """
        return LayerStep(self.isa, query, low_bit_kvs, recent, k, scaling, softcap, sinks, at_once=True).run(stored)

    def layer_step(
        self,
        query: Tensor,
        low_bit_kvs: Sequence[LowBitKV],
        recent: Sequence[RecentTokens],
        k: int,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> LayerStep:
        """Begin the same in three calls: the caller fetches selected rows before the last."""
        return LayerStep(self.isa, query, low_bit_kvs, recent, k, scaling, softcap, sinks, at_once=False)


class LayerStep:
    """The attention of one layer of a step. Use it once.

    Call `run` if `at_once`, else `select`, `attend_low_bit` and `attend_fetched`. Both give the
    same bits where all rows are fetched.
    """

    def __init__(
        self,
        isa: str,
        query: Tensor,
        low_bit_kvs: Sequence[LowBitKV],
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
        self._held = query, low_bit_kvs, recent, sinks  # the C++ object points into them
        self._shape = (len(low_bit_kvs), low_bit_kvs[0].num_kv_heads, query.shape[2], k)
        self._step = _native.LayerStep(
            isa,
            torch.get_num_threads(),
            _layout_of(low_bit_kvs),
            [_native_kv(low_bit_kv, low_bit_kv.length) for low_bit_kv in low_bit_kvs],
            query.data_ptr(),
            query.shape[1] // low_bit_kvs[0].num_kv_heads,
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
        """Compute everything with rows [Hkv, capacity, 2 D] per sequence, read in place.

        Returns:
            float32 [B, Hq, n, D].
        """
        out, size = torch.empty_like(self._held[0]), stored[0].itemsize
        numbers = [n for kv_rows in stored for n in (kv_rows.data_ptr(), kv_rows.stride(0) * size, kv_rows.stride(1) * size)]
        self._step.run(numbers, _DTYPES[stored[0].dtype], out.data_ptr())
        return out

    def select(self) -> Tensor:
        """Select each query's positions [B, Hkv, n, k], ascending, padded with -1."""
        positions = torch.empty(self._shape, dtype=torch.int64)
        self._step.select(positions.data_ptr())
        return positions

    def attend_low_bit(self, positions: Tensor) -> None:
        """Attend to the low-bit copy without the pairs at `positions` [B, Hkv, n, k] (-1: none)."""
        positions = positions.contiguous()
        self._step.attend_copy(positions.data_ptr(), positions.shape[-1])

    def attend_fetched(self, positions: Tensor, kv_rows: Tensor) -> Tensor:
        """Add the exact rows [B, Hkv, n, k, 2 D] of the same positions and the recent tokens.

        Returns:
            float32 [B, Hq, n, D].
        """
        positions = positions.contiguous()
        kv_rows = kv_rows if kv_rows.stride(-1) == 1 else kv_rows.contiguous()
        out = torch.empty_like(self._held[0])
        self._step.attend_fetched(
            positions.data_ptr(),
            positions.shape[-1],
            kv_rows.data_ptr(),
            _DTYPES[kv_rows.dtype],
            _kv_row_strides(kv_rows),
            out.data_ptr(),
        )
        return out


def _recent_numbers(recent: Sequence[RecentTokens]) -> list[int]:
    """Return addresses of keys and values, count, and strides of head and token, per sequence."""
    numbers: list[int] = []
    for tokens in recent:
        head, token, _ = tokens.keys.stride()
        size = tokens.keys.itemsize
        numbers += [tokens.keys.data_ptr(), tokens.values.data_ptr(), tokens.keys.shape[1], head * size, token * size]
    return numbers


def _kv_row_strides(kv_rows: Tensor) -> list[int]:
    """Return the byte strides of sequence, KV head, query and slot, of rows [B, Hkv, n, k, 2 D]."""
    return [stride * kv_rows.itemsize for stride in kv_rows.stride()[:4]]


def _native_kv(low_bit_kv: LowBitKV, length: int) -> Any:
    parts = [run.addresses for run in low_bit_kv.runs]
    pages = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    channel_scales = 0 if low_bit_kv.channel_scales is None else low_bit_kv.channel_scales.data_ptr()
    return _native.Copy(pages, length, channel_scales)


def _layout_of(low_bit_kvs: Sequence[LowBitKV]) -> Any:
    return _layout(next((low_bit_kv for low_bit_kv in low_bit_kvs if low_bit_kv.runs), low_bit_kvs[0]))


def _layout(low_bit_kv: LowBitKV) -> Any:
    offsets = _offsets(low_bit_kv.runs[0], low_bit_kv.code) if low_bit_kv.runs else (0,) * 6
    return _native_layout(
        low_bit_kv.code, low_bit_kv.bits, low_bit_kv.group_size, low_bit_kv.num_kv_heads, low_bit_kv.head_dim, offsets
    )


def _offsets(run: PageRun, code: Code) -> tuple[int, ...]:
    """Return the byte offset of each field in a page."""
    start = int(run.fields["key_codes"].storage_offset())
    return tuple(int(run.fields[name].storage_offset()) * run.fields[name].itemsize - start for name in _FIELDS[code])


@lru_cache(maxsize=64)
def _native_layout(code: Code, bits: int, group_size: int, heads: int, dim: int, offsets: tuple[int, ...]) -> Any:
    assert PAGE_TOKENS == 64, "csrc/layout.hpp"
    return _native.Layout(_CODES[code], bits, group_size, heads, dim, min(group_size, dim), list(offsets), _signs(dim))


def _signs(dim: int) -> list[float]:
    """Return the rotation's random signs: each column is one of a Hadamard matrix times a sign.

    The first row of a Hadamard matrix is positive.
    """
    matrix = rotation(dim, torch.device("cpu"))
    first = (matrix != 0).int().argmax(0)  # the first row of each column's block
    return matrix[first, torch.arange(dim, device=matrix.device)].sign().tolist()
