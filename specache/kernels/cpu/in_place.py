"""One layer of a decode step in one C++ call (csrc/in_place.cpp, csrc/fetched_step.cpp).

The call stores the committed token, checks that it is finite, gets the 16-bit rows, and attends.
What C++ knows of a layer is kept from step to step: this file compares it with the layer and
updates what has changed. It checks tensors and passes their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from specache.config import TopK
from specache.kernels.cpu.native_layout import layout, page_addresses, scale_address
from specache.kernels.finite import not_finite
from specache.kernels.types import AttentionParams, FetchCounts, FetchedRows, FetchedStep, StoredLayer, StoredRows
from specache.platform.extension import DTYPES, native
from specache.platform.step_threads import step_threads

ALL_FINITE = -1  # csrc/in_place.hpp
READS_FAILED = -2  # csrc/fetched_step.hpp


class Backend(Protocol):
    """The kernels of one instruction set."""

    isa: str


class Kept:
    """What C++ knows of one layer of one sequence, and the versions that it is of
    (`specache.kernels.types.KeptLayer`).
    """

    __slots__ = ("backend", "dtype", "native", "pages", "rows", "scales", "shape", "version")

    def __init__(self, residual: Tensor) -> None:
        self.native = native.StoredLayer()
        self.backend: Backend | None = None  # of the last step
        self.dtype: torch.dtype | None = None  # of its queries
        self.pages = self.version = -1
        self.rows: StoredRows | None = None
        self.scales: Tensor | None = None
        self.shape = residual.shape[1], residual.shape[3]  # Hkv, D
        keys, values = residual
        head, token, _ = (stride * residual.itemsize for stride in keys.stride())
        self.native.set_residual(keys.data_ptr(), values.data_ptr(), head, token, keys.shape[1])

    def serves(self, backend: Any, dtype: torch.dtype) -> bool:
        return backend is self.backend and dtype is self.dtype


def decode(
    backend: Backend,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Sequence[StoredLayer],
    commits: bool,
    top_k: TopK,
    params: AttentionParams,
) -> Tensor:
    """Run a step as `specache.kernels.dispatch.decode_in_place` documents."""
    arguments = Arguments(backend, query, keys, values, layers, commits, top_k, params)
    natives = [_updated(layer, commits, arguments.shape) for layer in layers]
    found = native.decode_in_place(
        arguments.native, natives, [count for layer in layers for count in (layer.table.length, layer.residual_count)]
    )
    arguments.note(layers)
    if found != ALL_FINITE:
        raise not_finite(layers[0].index, "values" if found % 2 else "keys")
    return arguments.out


def decode_fetched(
    backend: Backend,
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
    """Run a step as `specache.kernels.dispatch.decode_fetched` documents."""
    arguments = Arguments(backend, query, keys, values, layers, commits, top_k, params)
    on_disk = [rows.on_disk for rows in fetched if rows.on_disk is not None]
    natives = [
        (_with_pages(layer, arguments.shape) if rows.on_disk else _updated(layer, commits and not rows.stored, arguments.shape))
        for layer, rows in zip(layers, fetched, strict=True)
    ]
    counts = [
        count
        for layer, rows in zip(layers, fetched, strict=True)
        for count in (layer.table.length, layer.residual_count, rows.pending, rows.stored)
    ]
    following = None
    if selects_next:
        k = top_k.of(max(layer.table.length + rows.pending for layer, rows in zip(layers, fetched, strict=True)))
        following = torch.empty(len(layers), arguments.shape[0], k, dtype=torch.int64)
    hot = [rows.hot.native for rows in fetched]
    found, numbers = native.decode_fetched(
        arguments.native, natives, counts, hot, on_disk, real_queries, 0 if following is None else following.data_ptr()
    )
    arguments.note(layers)
    if found >= 0:
        raise not_finite(layers[0].index, "values" if found % 2 else "keys")
    return FetchedStep(None if found == READS_FAILED else arguments.out, following, [FetchCounts(*of) for of in numbers])


def known_layer(layer: StoredLayer, shape: tuple[int, int], commits: bool, on_disk: bool) -> Any | None:
    """Return what C++ knows of a layer that has run a step in one call, as the layer is now.

    `None` of one that has not.

    Args:
        shape: KV heads and head dimension of the step's keys.
        commits: whether a token is stored behind its rows.
        on_disk: whether its rows lie on a disk.
    """
    if not isinstance(layer.kept, Kept):
        return None
    return _with_pages(layer, shape) if on_disk else _updated(layer, commits, shape)


class Arguments:
    """What C++ takes of every step: tensors, checked and kept alive, by their addresses.

    Attributes:
        native: the C++ object.
        out: [B, n, Hq, D], for the result.
        shape: KV heads and head dimension of the step's keys.
    """

    __slots__ = ("_backend", "_held", "native", "out", "shape")

    def __init__(
        self,
        backend: Backend,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        layers: Sequence[StoredLayer],
        commits: bool,
        top_k: TopK,
        params: AttentionParams,
    ) -> None:
        strides = query.stride() + keys.stride() + values.stride()
        if strides[3] != 1 or strides[7] != 1 or strides[11] != 1:
            query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
            strides = query.stride() + keys.stride() + values.stride()
        batch, query_heads, n, dim = query.shape
        if len(layers) != batch:
            raise ValueError(f"{batch} queries for {len(layers)} sequences")
        heads = keys.shape[1]
        sinks = params.sinks if params.sinks is None else params.sinks.contiguous()
        self.shape = heads, dim
        self.out = query.new_empty((batch, n, query_heads, dim))
        self._held = query, keys, values, sinks
        self._backend = backend
        self.native = native.StepArguments(
            backend.isa,
            step_threads(),
            query.data_ptr(),
            DTYPES[query.dtype],
            query_heads // heads,
            n,
            strides,
            keys.data_ptr(),
            values.data_ptr(),
            DTYPES[keys.dtype],
            commits,
            top_k,
            params.scaling,
            params.softcap or 0.0,
            0 if sinks is None else sinks.data_ptr(),
            0 if sinks is None else DTYPES[sinks.dtype],
            self.out.data_ptr(),
        )

    def note(self, layers: Sequence[StoredLayer]) -> None:
        """Note that the layers' last step ran with these kernels and this dtype."""
        for layer in layers:
            kept = layer.kept
            assert isinstance(kept, Kept), "just updated"
            kept.backend, kept.dtype = self._backend, self.out.dtype


def _updated(layer: StoredLayer, commits: bool, shape: tuple[int, int]) -> Any:
    """Return what C++ knows of a layer with rows in memory, as the layer is now.

    Args:
        commits: whether a token is stored behind them.
        shape: KV heads and head dimension of the step's keys.
    """
    known = _with_pages(layer, shape)
    kept = layer.kept
    assert isinstance(kept, Kept), "just updated"
    rows, length = kept.rows, layer.table.length + layer.residual_count
    if rows is None or (commits and not rows.own_from <= length < rows.capacity):
        rows = kept.rows = layer.rows_with_room(commits)
    if rows.version != kept.version:
        known.set_rows(rows.addresses, rows.shift, *rows.strides, rows.capacity)
        kept.version = rows.version
    return known


def _with_pages(layer: StoredLayer, shape: tuple[int, int]) -> Any:
    """Return what C++ knows of a layer, with its residual and pages as they are now."""
    kept = layer.kept
    if not isinstance(kept, Kept):
        kept = layer.kept = Kept(layer.residual_buffer)
    if shape != kept.shape:
        raise ValueError(f"layer {layer.index} stores (heads, dimension) {kept.shape}, got {shape}")
    version, scales = layer.table.version, layer.channel_scales
    if version != kept.pages or scales is not kept.scales:
        low_bit_kv = layer.low_bit_kv
        kept.native.set_pages(layout(low_bit_kv), page_addresses(low_bit_kv), scale_address(low_bit_kv))
        kept.pages, kept.scales = version, scales
    return kept.native
