"""One layer of a decode step over 16-bit rows in memory, in one C++ call (csrc/in_place.cpp).

The call stores the committed token, checks that it is finite, and attends. What C++ knows of a
layer is kept from step to step: this file compares it with the layer and updates what has changed.
It checks tensors and passes their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from specache.kernels.cpu.native_layout import layout, page_addresses, scale_address
from specache.kernels.finite import not_finite
from specache.kernels.types import AttentionParams, InPlaceLayer, StoredRows
from specache.platform.extension import DTYPES, native

ALL_FINITE = -1  # csrc/in_place.hpp


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
    layers: Sequence[InPlaceLayer],
    commits: bool,
    top_k: int,
    params: AttentionParams,
) -> Tensor:
    """Run a step as `specache.kernels.dispatch.decode_in_place` documents."""
    strides = query.stride() + keys.stride() + values.stride()
    if strides[3] != 1 or strides[7] != 1 or strides[11] != 1:
        query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
        strides = query.stride() + keys.stride() + values.stride()
    batch, query_heads, n, dim = query.shape
    heads = keys.shape[1]
    natives = [_updated(layer, commits, (heads, dim)) for layer in layers]
    if len(natives) != batch:
        raise ValueError(f"{batch} queries for {len(natives)} sequences")
    sinks = params.sinks if params.sinks is None else params.sinks.contiguous()
    out = query.new_empty((batch, n, query_heads, dim))
    found = native.decode_in_place(
        backend.isa,
        torch.get_num_threads(),
        natives,
        [count for layer in layers for count in (layer.table.length, layer.residual_count)],
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
        out.data_ptr(),
    )
    kept = layers[0].kept
    assert isinstance(kept, Kept), "just updated"
    kept.backend, kept.dtype = backend, query.dtype
    if found != ALL_FINITE:
        raise not_finite(layers[0].index, "values" if found % 2 else "keys")
    return out


def _updated(layer: InPlaceLayer, commits: bool, shape: tuple[int, int]) -> Any:
    """Return what C++ knows of a layer, as the layer is now.

    Args:
        shape: KV heads and head dimension of the step's keys.
    """
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
    rows, length = kept.rows, layer.table.length + layer.residual_count
    if rows is None or (commits and not rows.own_from <= length < rows.capacity):
        rows = kept.rows = layer.rows_with_room(commits)
    if rows.version != kept.version:
        kept.native.set_rows(rows.addresses, rows.shift, *rows.strides, rows.capacity)
        kept.version = rows.version
    return kept.native
