"""The choice of a backend for the kernels.

    quantise(keys [Hkv, n, D], values [Hkv, n, D], low_bit_kv, start)
        writes tokens `[start, start + n)` into the pages; `start` and `n` are whole groups
    layer_step(query [B, Hq, n, D], low_bit_kvs, recent, top_k, params)
        begins a decode step's attention in one layer (`specache.kernels.types.LayerStep`)

A layer step takes a ragged batch: one `LowBitKV` per sequence. PyTorch's operations support every
device, and the other backends are tested against them. Paper: Algorithm 3; layout: KIVI.

Tensors on the CPU go to the fastest C++ kernels of this processor, and all others to PyTorch. On
CUDA, Triton (`kernels/triton/`) quantises if it supports the layer; its other kernels run in static
steps only (`specache.device.step`). The environment variable `SPECACHE_KERNELS` forces a
backend: `torch` everywhere; on the CPU an instruction set of the C++ kernels (`generic`, `avx2`,
`avx512`, `amx`, `neon`), or `triton` (on the CPU only in its interpreter, for tests).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from specache.config import Code, TopK
from specache.errors import ConfigError
from specache.kernels import gpu_quantise
from specache.kernels import triton as triton_kernels
from specache.kernels.cpu import in_place, native
from specache.kernels.torch import operations as torch_ops
from specache.kernels.torch.layer_step import TorchLayerStep
from specache.kernels.types import AttentionParams, FetchedRows, FetchedStep, LayerStep, LowBitKV, RecentTokens, StoredLayer

OPERATIONS = ("quantise", "score", "rescore", "select", "attend")  # as `specache doctor` lists them; a layer step has the last four
VARIABLE = "SPECACHE_KERNELS"
TRITON = "triton"
ON_CPU = f"On the CPU, Triton has an interpreter, to test only: set {triton_kernels.INTERPRETER}=1 before Python starts."


def available() -> list[str]:
    """Return the backends for the CPU, fastest last."""
    return list(_backends())


def _backends() -> dict[str, Callable[[], Any]]:
    """Return what loads each backend for the CPU, fastest last."""
    return {"torch": lambda: torch_ops, **{isa: partial(native.NativeKernels, isa) for isa in native.instruction_sets()}}


def active() -> dict[str, str]:
    """Return operation -> name of its backend on the CPU, for `specache doctor`."""
    return dict.fromkeys(OPERATIONS, _chosen()[0])


@contextmanager
def using(name: str) -> Iterator[None]:
    """Force a backend inside the block (for all threads).

    Raises:
        ConfigError: the backend is not available here.
    """
    global _forced
    before, _forced = _forced, (name, _load(name))
    try:
        yield
    finally:
        _forced = before


def quantise(keys: Tensor, values: Tensor, low_bit_kv: LowBitKV, start: int) -> None:
    on_cuda = keys.device.type == "cuda"
    if forces_torch() or not (on_cuda or _chosen()[0] == TRITON):
        _backend_for(keys, low_bit_kv.head_dim, low_bit_kv.code).quantise(keys, values, low_bit_kv, start)
        return
    if not (on_cuda or triton_kernels.interpreted()):
        raise ConfigError(f"{VARIABLE}={TRITON!r} runs on a GPU, and this tensor is on the CPU. {ON_CPU}")
    gpu_quantise.quantise(keys, values, low_bit_kv, start)


def layer_step(
    query: Tensor, low_bit_kvs: Sequence[LowBitKV], recent: Sequence[RecentTokens], top_k: TopK, params: AttentionParams
) -> LayerStep:
    backend = _step_backend_for(query, low_bit_kvs[0].head_dim, low_bit_kvs[0].code)
    return (backend.layer_step if backend else TorchLayerStep)(query, low_bit_kvs, recent, top_k, params)


def decode_in_place(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layers: Sequence[StoredLayer],
    commits: bool,
    top_k: TopK,
    params: AttentionParams,
) -> Tensor | None:
    """Compute a layer of a step in one call, each query with the 16-bit pairs that it selects.

    The pairs are read where they lie.

    Args:
        query: [B, Hq, n, D].
        keys, values: [B, Hkv, n, D] of the step's tokens, in the layers' dtype.
        layers: the layer's state in each of the B sequences.
        commits: first append each sequence's first token to its residual and its rows; the caller
            counts it.

    Returns:
        [B, n, Hq, D], contiguous, in the query's dtype: the same bits as a `LayerStep` gives for
        the selected positions. `None` where the backend has no such call.

    Raises:
        NonFiniteError: a committed key or value is NaN or infinity; nothing was appended.
    """
    backend = _at_once_backend(query, keys.shape[3], layers[0])
    return None if backend is None else backend.decode_in_place(query, keys, values, layers, commits, top_k, params)


def decode_fetched(
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
    """Compute a layer of a step in one call, with 16-bit pairs that are fetched into hot sets.

    Args:
        query, keys, values, layers, commits: see `decode_in_place`.
        fetched: per sequence, how it gets its pairs: all from memory, or all from a disk.
        real_queries: the first queries, which get all pairs that they select. The others get those
            that are in the hot set by then.
        selects_next: whether the rows that the last query selects for the next step are fetched
            too. Those on a disk may arrive later.

    The backend must have such a call (`fetches_at_once`).

    Raises:
        NonFiniteError: a committed key or value is NaN or infinity; nothing was appended.
    """
    backend = _at_once_backend(query, keys.shape[3], layers[0])
    result: FetchedStep = backend.decode_fetched(  # type: ignore[union-attr]
        query, keys, values, layers, fetched, commits, top_k, params, real_queries, selects_next
    )
    return result


def known_layer(
    layer: StoredLayer, dtype: torch.dtype, shape: tuple[int, int], commits: bool, on_disk: bool
) -> tuple[str, Any] | None:
    """Return the instruction set of a layer's last step in one call, and what C++ knows of it now.

    `None` where that step did not run on the backend that would be chosen now, with queries of this
    dtype.

    Args:
        shape: KV heads and head dimension of the step's keys.
        commits: whether the next step stores a token.
        on_disk: whether the layer's rows lie on a disk.
    """
    backend = _chosen()[1]
    if layer.kept is None or not layer.kept.serves(backend, dtype):
        return None
    known = in_place.known_layer(layer, shape, commits, on_disk)
    return None if known is None else (backend.isa, known)


def fetches_at_once(query: Tensor, dim: int, layer: StoredLayer) -> bool:
    """Return whether a backend has `decode_fetched` for queries [B, Hq, n, D]."""
    return _at_once_backend(query, dim, layer) is not None


def forces_torch() -> bool:
    """Return whether PyTorch's kernels are forced, also on a GPU."""
    return (_forced[0] if _forced else os.environ.get(VARIABLE)) == "torch"


def _at_once_backend(query: Tensor, dim: int, layer: StoredLayer) -> Any | None:
    """Return the backend that computes a layer of a step in one call, or `None`."""
    kept, (_, backend) = layer.kept, _chosen()
    if kept is not None and kept.serves(backend, query.dtype):
        return backend
    return _step_backend_for(query, dim, layer.table.code)


def _step_backend_for(query: Tensor, dim: int, code: Code) -> Any | None:
    """Return the backend with a layer step for queries [B, Hq, n, D], or `None` for PyTorch's."""
    backend = _backend_for(query, dim, code)
    return None if backend is torch_ops else backend


def _backend_for(tensor: Tensor, dim: int, code: Code) -> Any:
    name, backend = _chosen()
    device = tensor.device.type
    if device == "cuda" or name == TRITON:
        return torch_ops
    if native.IMPORT_ERROR and device == "cpu" and VARIABLE not in os.environ:
        _warn_without_native()
    if device != "cpu" or backend is torch_ops:
        return torch_ops
    return backend if backend.supports(dim, tensor.dtype, code) else torch_ops


def _chosen() -> tuple[str, Any]:
    """Return name and backend for the CPU."""
    return _forced or _default()


@cache
def _default() -> tuple[str, Any]:
    name = os.environ.get(VARIABLE) or available()[-1]
    return name, _load(name)


@cache
def _warn_without_native() -> None:
    warnings.warn(
        f"specache's C++ kernels are not installed ({native.IMPORT_ERROR}): decoding runs on PyTorch, many times slower. "
        "See `specache doctor`.",
        RuntimeWarning,
        stacklevel=2,
    )


def _load(name: str) -> Any:
    if name == TRITON:
        if not triton_kernels.interpreted() and (reason := triton_kernels.unsupported_reason()):
            raise ConfigError(f"{VARIABLE}={name!r} is not available here ({reason}). {ON_CPU}")
        return triton_kernels.load()
    if name not in available():
        known = ", ".join([*available(), TRITON])
        reason = f" ({native.IMPORT_ERROR})" if native.IMPORT_ERROR and name != "torch" else ""
        raise ConfigError(f"{VARIABLE}={name!r} is not available here{reason}. There is {known}.")
    return _backends()[name]()


_forced: tuple[str, Any] | None = None
