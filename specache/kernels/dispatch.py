"""The kernels' signatures, and which implementation serves each.

Every operation takes a ragged batch: one `LowBitKV` per sequence. A backend has these operations; the plain PyTorch one serves
every device and is what the others are tested against.

    quantise(keys [Hkv, n, D], values [Hkv, n, D], copy, start) -> None
        writes tokens `[start, start + n)` into the copy's pages; `start` and `n` are whole groups
    score(query [B, Hq, n, D], copies, lengths, scaling, softcap) -> float32 scores [B, Hkv, G, n, S], -inf past a sequence's length
    rescore(query, scores, positions [B, Hkv, n, k], rows [B, Hkv, n, k, 2D], scaling, softcap) -> None
        puts exact scores of the fetched keys in place; position -1 means no pair
    select(scores, rest_lse [B, Hkv, G, n], lengths, k) -> positions [B, Hkv, n, k], ascending, ties to the lower, -1 padding
    attend(scores, positions, rows, copies, lengths) -> (out [B, Hkv, G, n, D], lse [B, Hkv, G, n]); destroys scores

`rest_lse` is the log-sum-exp of everything a row sees outside the copy. Paper: Algorithm 3; layout: KIVI.

Tensors on CUDA are served by Triton (`kernels/triton/`) where it can, tensors on the CPU by the fastest C++ kernels that this
processor runs, else by PyTorch. The environment variable `SPECACHE_KERNELS` forces a backend: `torch` everywhere, on the CPU an
instruction set of the C++ kernels (`generic`, `avx2`, `avx512`, `amx`, `neon`), or `triton` (on the CPU in its interpreter only, to
test).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from specache.errors import ConfigError
from specache.kernels import triton as triton_kernels
from specache.kernels.cpu import native
from specache.kernels.guarded import GuardedKernels
from specache.kernels.torch import operations as torch_ops
from specache.kernels.types import LowBitKV

OPERATIONS = ("quantise", "score", "rescore", "select", "attend")
VARIABLE = "SPECACHE_KERNELS"
TRITON = "triton"
ON_CPU = f"On the CPU, Triton has an interpreter, to test only: set {triton_kernels.INTERPRETER}=1 before Python starts."


def available() -> list[str]:
    """Backends for the CPU, fastest last."""
    return ["torch", *native.instruction_sets()]


def active() -> dict[str, str]:
    """Operation -> name of the backend that serves it on the CPU, for `specache doctor`."""
    return dict.fromkeys(OPERATIONS, _chosen()[0])


@contextmanager
def using(name: str) -> Iterator[None]:
    """Force a backend inside the block (for all threads).

    Raises:
        ConfigError: it is not available here.
    """
    global _forced
    before, _forced = _forced, (name, _load(name))
    try:
        yield
    finally:
        _forced = before


def quantise(keys: Tensor, values: Tensor, copy: LowBitKV, start: int) -> None:
    _serving(keys, copy.head_dim, copy.group_size).quantise(keys, values, copy, start)


def score(query: Tensor, copies: Sequence[LowBitKV], lengths: Sequence[int], scaling: float, softcap: float | None) -> Tensor:
    return _serving(query, query.shape[-1], copies[0].group_size).score(query, copies, lengths, scaling, softcap)


def rescore(query: Tensor, scores: Tensor, positions: Tensor, rows: Tensor, scaling: float, softcap: float | None) -> None:
    _serving(rows, query.shape[-1]).rescore(query, scores, positions, rows, scaling, softcap)


def select(scores: Tensor, rest_lse: Tensor, lengths: Sequence[int], k: int) -> Tensor:
    return _serving(scores).select(scores, rest_lse, lengths, k)


def attend(
    scores: Tensor, positions: Tensor, rows: Tensor, copies: Sequence[LowBitKV], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return _serving(rows, copies[0].head_dim, copies[0].group_size).attend(scores, positions, rows, copies, lengths)


def fused(query: Tensor) -> native.NativeKernels | None:
    """The backend that does a layer of a step in one call (`decode_in_place`), if one serves this query [B, Hq, n, D]."""
    backend = _serving(query, query.shape[-1])
    return backend if isinstance(backend, native.NativeKernels) else None


def forces_torch() -> bool:
    """Whether PyTorch's kernels were asked for, also on a GPU."""
    return (_forced[0] if _forced else os.environ.get(VARIABLE)) == "torch"


def _serving(tensor: Tensor, dim: int = 1, group_size: int = 64) -> Any:
    name, backend = _chosen()
    if tensor.device.type == "cuda" or name == TRITON:
        return torch_ops if forces_torch() else _serving_gpu(tensor, dim, group_size)
    if native.MISSING and tensor.device.type == "cpu" and VARIABLE not in os.environ:
        _say_once()
    if tensor.device.type != "cpu" or backend is torch_ops or not backend.serves(dim, tensor.dtype):
        return torch_ops
    return backend


def _serving_gpu(tensor: Tensor, dim: int, group_size: int) -> Any:
    """Triton, if it runs where the tensor is and serves its layer."""
    if tensor.device.type == "cpu":
        if not triton_kernels.interpreted():
            raise ConfigError(f"{VARIABLE}={TRITON!r} runs on a GPU, and this tensor is on the CPU. {ON_CPU}")
    elif reason := _missing(tensor.device):
        _say_not_served(reason)
        return torch_ops
    if reason := _triton().refuses(dim, tensor.dtype, group_size):
        _say_not_served(reason)
        return torch_ops
    return _triton() if tensor.device.type == "cpu" else _guarded(tensor.device)


@cache
def _missing(device: torch.device) -> str | None:
    return triton_kernels.missing(device)


@cache
def _triton() -> Any:
    return triton_kernels.load()


@cache
def _guarded(device: torch.device) -> GuardedKernels:
    def give_up(error: Exception) -> None:
        _say_not_served(f"a kernel cannot be built for {device} ({triton_kernels.said(error)})")

    return GuardedKernels(_triton(), triton_kernels.build_errors(), give_up)


@cache
def _say_not_served(reason: str) -> None:
    warnings.warn(f"specache's Triton kernels do not serve this: {reason}. PyTorch does, slower.", RuntimeWarning, stacklevel=2)


def _chosen() -> tuple[str, Any]:
    """Name and backend for the CPU."""
    return _forced or _default()


@cache
def _default() -> tuple[str, Any]:
    name = os.environ.get(VARIABLE) or available()[-1]
    return name, _load(name)


@cache
def _say_once() -> None:
    warnings.warn(
        f"specache's C++ kernels are not installed ({native.MISSING}): decoding runs on PyTorch, many times slower. "
        "See `specache doctor`.",
        RuntimeWarning,
        stacklevel=2,
    )


def _load(name: str) -> Any:
    if name == TRITON:
        if not triton_kernels.interpreted() and (reason := triton_kernels.missing()):
            raise ConfigError(f"{VARIABLE}={name!r} is not available here ({reason}). {ON_CPU}")
        return _triton()
    if name not in available():
        known = ", ".join([*available(), TRITON])
        reason = f" ({native.MISSING})" if native.MISSING and name != "torch" else ""
        raise ConfigError(f"{VARIABLE}={name!r} is not available here{reason}. There is {known}.")
    return torch_ops if name == "torch" else native.NativeKernels(name)


_forced: tuple[str, Any] | None = None
