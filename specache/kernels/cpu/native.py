"""The C++ kernels (csrc/): quantising, and a decode step's attention in one layer.

This file checks tensors and passes their addresses. Scores are integer dot products of codes with
the query rounded to 8 bits; values are summed with the softmax weights of a page rounded to 8 bits;
everything else is float32. Only for tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specache.config import Code, TopK
from specache.errors import NonFiniteError
from specache.kernels.cpu import in_place
from specache.kernels.cpu.native_layout import CODES, layout, layout_of, page_addresses, scale_address
from specache.kernels.finite import all_finite
from specache.kernels.types import AttentionParams, FetchedRows, FetchedStep, HotRows, LowBitKV, RecentTokens, StoredLayer
from specache.platform import extension
from specache.platform.extension import DTYPES, IMPORT_ERROR, instruction_sets
from specache.platform.step_threads import step_threads

__all__ = ["IMPORT_ERROR", "NativeKernels", "NativeLayerStep", "instruction_sets"]

_native = extension.native


def new_hot_set(num_kv_heads: int) -> Any:
    """Return a hot set's index in C++ (`specache.rows.native_hot_set`)."""
    return _native.HotSet(num_kv_heads)


class NativeKernels:
    """The kernels of one instruction set."""

    def __init__(self, isa: str) -> None:
        self.isa = isa

    @staticmethod
    def supports(dim: int, dtype: torch.dtype, code: Code) -> bool:
        """Return whether layers of this head dimension, dtype and code are supported."""
        return dim <= _native.MAX_DIM and dtype in DTYPES and code in CODES

    def quantise(self, keys: Tensor, values: Tensor, low_bit_kv: LowBitKV, start: int) -> None:
        keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
        if not (all_finite(keys) and all_finite(values)):
            raise NonFiniteError("Keys or values to quantise hold NaN or infinity. Nothing was packed.")
        size = keys.itemsize
        strides = [stride * size for x in (keys, values) for stride in x.stride()[:2]]
        _native.quantise(
            self.isa,
            step_threads(),
            layout(low_bit_kv),
            _native_kv(low_bit_kv, low_bit_kv.length),
            keys.data_ptr(),
            values.data_ptr(),
            strides,
            DTYPES[keys.dtype],
            start,
            keys.shape[1],
        )

    def layer_step(
        self,
        query: Tensor,
        low_bit_kvs: Sequence[LowBitKV],
        recent: Sequence[RecentTokens],
        top_k: TopK,
        params: AttentionParams,
    ) -> NativeLayerStep:
        """Begin a decode step's attention in one layer (`LayerStep`).

        Args:
            query: [B, Hq, n, D].
        """
        step = NativeLayerStep(self.isa, query, low_bit_kvs, recent, top_k, params)
        step.score()
        return step

    def decode_in_place(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        layers: Sequence[StoredLayer],
        commits: bool,
        top_k: TopK,
        params: AttentionParams,
    ) -> Tensor:
        return in_place.decode(self, query, keys, values, layers, commits, top_k, params)

    def decode_fetched(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        layers: Sequence[StoredLayer],
        fetched: Sequence[FetchedRows],
        commits: bool,
        top_k: TopK,
        params: AttentionParams,
        real_queries: int,
        selects_next: bool,
    ) -> FetchedStep:
        return in_place.decode_fetched(
            self, query, keys, values, layers, fetched, commits, top_k, params, real_queries, selects_next
        )


class NativeLayerStep:
    """`LayerStep` of `kernels/types.py` in C++."""

    def __init__(
        self,
        isa: str,
        query: Tensor,
        low_bit_kvs: Sequence[LowBitKV],
        recent: Sequence[RecentTokens],
        top_k: TopK,
        params: AttentionParams,
    ) -> None:
        query = query.float().contiguous()
        sinks = params.sinks if params.sinks is None else params.sinks.float().contiguous()
        self._held = query, low_bit_kvs, recent, sinks  # the C++ object points into them
        heads, longest = low_bit_kvs[0].num_kv_heads, max(low_bit_kv.length for low_bit_kv in low_bit_kvs)
        self._shape = (len(low_bit_kvs), heads, query.shape[2], top_k.of(longest))
        self._step = _native.LayerStep(
            isa,
            step_threads(),
            layout_of(low_bit_kvs),
            [_native_kv(low_bit_kv, low_bit_kv.length) for low_bit_kv in low_bit_kvs],
            query.data_ptr(),
            query.shape[1] // heads,
            query.shape[2],
            params.scaling,
            params.softcap or 0.0,
            _recent_numbers(recent),
            DTYPES[recent[0].keys.dtype],
            top_k,
            0 if sinks is None else sinks.data_ptr(),
        )

    def score(self) -> None:
        """Score every low-bit key and attend to the recent tokens, first of all."""
        self._step.score()

    def rescore(self, positions: Tensor, kv_rows: Tensor) -> None:
        if positions.numel():
            positions, kv_rows = positions.contiguous(), _last_contiguous(kv_rows)
            self._step.rescore(*_fetched_numbers(positions, kv_rows))

    def select(self) -> Tensor:
        positions = torch.empty(self._shape, dtype=torch.int64)
        self._step.select(positions.data_ptr())
        return positions

    def select_next(self) -> Tensor:
        positions = torch.empty(*self._shape[:2], self._step.next_k, dtype=torch.int64)
        self._step.select_next(positions.data_ptr())
        return positions

    def attend_low_bit(self, positions: Tensor) -> None:
        positions = positions.contiguous()
        self._step.attend_low_bit(positions.data_ptr(), positions.shape[-1])

    def attend_fetched(self, positions: Tensor, kv_rows: Tensor) -> Tensor:
        positions, kv_rows = positions.contiguous(), _last_contiguous(kv_rows)
        out = torch.empty_like(self._held[0])
        self._step.attend_fetched(*_fetched_numbers(positions, kv_rows), out.data_ptr())
        return out

    def attend_hot(self, positions: Tensor, hot: Sequence[HotRows], slots: Tensor) -> Tensor:
        """Do what `attend_fetched` does, with rows at slots [B, Hkv, n, k] of the hot sets."""
        positions, slots = positions.contiguous(), slots.contiguous()
        out = torch.empty_like(self._held[0])
        where = positions.data_ptr(), positions.shape[-1], [one.native for one in hot], slots.data_ptr()
        self._step.attend_hot(*where, DTYPES[hot[0].kv_rows.dtype], out.data_ptr())
        return out


def _recent_numbers(recent: Sequence[RecentTokens]) -> list[int]:
    """Return addresses, count, strides of head and token, and pending tokens, per sequence."""
    numbers: list[int] = []
    for tokens in recent:
        head, token, _ = tokens.keys.stride()
        size = tokens.keys.itemsize
        addresses = tokens.keys.data_ptr(), tokens.values.data_ptr()
        numbers += [*addresses, tokens.keys.shape[1], head * size, token * size, tokens.pending]
    return numbers


def _fetched_numbers(positions: Tensor, kv_rows: Tensor) -> tuple[int, int, int, int, list[int]]:
    """Return addresses, k, dtype and byte strides of positions and rows [B, Hkv, n, k, 2 D]."""
    strides = [stride * kv_rows.itemsize for stride in kv_rows.stride()[:4]]
    return positions.data_ptr(), positions.shape[-1], kv_rows.data_ptr(), DTYPES[kv_rows.dtype], strides


def _last_contiguous(kv_rows: Tensor) -> Tensor:
    return kv_rows if kv_rows.stride(-1) == 1 else kv_rows.contiguous()


def _native_kv(low_bit_kv: LowBitKV, length: int) -> Any:
    return _native.LowBitKV(page_addresses(low_bit_kv), length, scale_address(low_bit_kv))
