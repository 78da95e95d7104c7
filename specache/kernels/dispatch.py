"""The kernels' signatures, and the choice of a backend for each call.

Every operation takes a ragged batch: one `LowBitKV` per sequence. Every backend has these
operations. The plain PyTorch backend supports every device, and the others are tested against it.

    quantise(keys [Hkv, n, D], values [Hkv, n, D], low_bit_kv, start)
        writes tokens `[start, start + n)` into the pages; `start` and `n` are whole groups
    score(query [B, Hq, n, D], low_bit_kvs, lengths, scaling, softcap)
        -> float32 scores [B, Hkv, G, n, S], -inf past a sequence's length
    rescore(query, scores, positions [B, Hkv, n, k], kv_rows [B, Hkv, n, k, 2D], scaling, softcap)
        replaces the scores of the fetched keys by exact ones; position -1 means no pair
    select(scores, rest_lse [B, Hkv, G, n], lengths, k)
        -> positions [B, Hkv, n, k], ascending, ties to the lower, -1 padding
    attend(scores, positions, kv_rows, low_bit_kvs, lengths)
        -> (out [B, Hkv, G, n, D], lse [B, Hkv, G, n]); destroys scores

`rest_lse` is the log-sum-exp over all tokens that a query sees outside the low-bit copy. Paper:
Algorithm 3; layout: KIVI.

Tensors on the CPU go to the fastest C++ kernels of this processor, and all others to PyTorch. On
CUDA, Triton (`kernels/triton/`) quantises if it supports the layer; its other kernels run in static
steps only (`specache.device.page_kernels`). The environment variable `SPECACHE_KERNELS` forces a
backend: `torch` everywhere; on the CPU an instruction set of the C++ kernels (`generic`, `avx2`,
`avx512`, `amx`, `neon`), or `triton` (on the CPU only in its interpreter, for tests).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor

from specache.errors import ConfigError
from specache.kernels import gpu_quantise
from specache.kernels import triton as triton_kernels
from specache.kernels.cpu import native
from specache.kernels.torch import operations as torch_ops
from specache.kernels.types import LowBitKV

OPERATIONS = ("quantise", "score", "rescore", "select", "attend")
VARIABLE = "SPECACHE_KERNELS"
TRITON = "triton"
ON_CPU = f"On the CPU, Triton has an interpreter, to test only: set {triton_kernels.INTERPRETER}=1 before Python starts."


def available() -> list[str]:
    """Return the backends for the CPU, fastest last."""
    return ["torch", *native.instruction_sets()]


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
        _backend_for(keys, low_bit_kv.head_dim).quantise(keys, values, low_bit_kv, start)
        return
    if not (on_cuda or triton_kernels.interpreted()):
        raise ConfigError(f"{VARIABLE}={TRITON!r} runs on a GPU, and this tensor is on the CPU. {ON_CPU}")
    gpu_quantise.quantise(keys, values, low_bit_kv, start)


def score(query: Tensor, low_bit_kvs: Sequence[LowBitKV], lengths: Sequence[int], scaling: float, softcap: float | None) -> Tensor:
    return _backend_for(query, query.shape[-1]).score(query, low_bit_kvs, lengths, scaling, softcap)


def rescore(query: Tensor, scores: Tensor, positions: Tensor, kv_rows: Tensor, scaling: float, softcap: float | None) -> None:
    _backend_for(kv_rows, query.shape[-1]).rescore(query, scores, positions, kv_rows, scaling, softcap)


def select(scores: Tensor, rest_lse: Tensor, lengths: Sequence[int], k: int) -> Tensor:
    return _backend_for(scores).select(scores, rest_lse, lengths, k)


def attend(
    scores: Tensor, positions: Tensor, kv_rows: Tensor, low_bit_kvs: Sequence[LowBitKV], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return _backend_for(kv_rows, low_bit_kvs[0].head_dim).attend(scores, positions, kv_rows, low_bit_kvs, lengths)


def fused(query: Tensor) -> native.NativeKernels | None:
    """Return the backend for whole layers (`decode_in_place`) if it supports [B, Hq, n, D]."""
    backend = _backend_for(query, query.shape[-1])
    return backend if isinstance(backend, native.NativeKernels) else None


def forces_torch() -> bool:
    """Return whether PyTorch's kernels are forced, also on a GPU."""
    return (_forced[0] if _forced else os.environ.get(VARIABLE)) == "torch"


def _backend_for(tensor: Tensor, dim: int = 1) -> Any:
    name, backend = _chosen()
    if tensor.device.type == "cuda" or name == TRITON:
        return torch_ops
    if native.IMPORT_ERROR and tensor.device.type == "cpu" and VARIABLE not in os.environ:
        _warn_without_native()
    if tensor.device.type != "cpu" or backend is torch_ops or not backend.supports(dim, tensor.dtype):
        return torch_ops
    return backend


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
    return torch_ops if name == "torch" else native.NativeKernels(name)


_forced: tuple[str, Any] | None = None
