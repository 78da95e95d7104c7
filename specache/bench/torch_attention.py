"""Baselines for one layer's attention: PyTorch's fused kernels, products, dequantising first.

All take a query [B, Hq, n, D], and keys and values [Hkv, S, D] that every row of every sequence
sees in full. For several sequences, each has a copy of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

GROUP = 64  # elements that share a scale


@dataclass(frozen=True)
class Baseline:
    """One implementation of the attention.

    Attributes:
        bits: per stored element.
        nbytes: bytes of keys and values that a step reads at least once.
        run: computes the attention.
    """

    impl: str
    bits: int
    nbytes: int
    run: Callable[[], Tensor]


def exact_baselines(query: Tensor, keys: Tensor, values: Tensor) -> list[Baseline]:
    """Return `sdpa` and matrix products over all keys and values, in float32 and bfloat16."""
    baselines = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        q, k, v = query.to(dtype), *(_per_sequence(tensor.to(dtype), query) for tensor in (keys, values))
        baselines.append(_baseline(f"sdpa {name}", k, v, partial(sdpa, q, k, v)))
        transposed = k.transpose(2, 3).contiguous()  # [B, Hkv, D, S]
        for layout, k_t in (("K", k.transpose(2, 3)), ("K^T", transposed)):
            baselines.append(_baseline(f"matmul {name}, {layout} contiguous", k, v, partial(matmul_attention, q, k_t, v)))
    return baselines


def gpu_baselines(query: Tensor, keys: Tensor, values: Tensor) -> list[Baseline]:
    """Return PyTorch's fused kernels in bfloat16, as far as they run here.

    They are the one that PyTorch chooses, flash attention, and both with the query heads of a KV
    head as rows of one head, so that keys and values are read once.
    """
    q = query.to(torch.bfloat16)
    k, v = (_per_sequence(tensor.to(torch.bfloat16), query) for tensor in (keys, values))
    runs: dict[str, Callable[[], Tensor]] = {
        "sdpa bf16": partial(sdpa, q, k, v),
        "sdpa bf16, heads as rows": partial(grouped_sdpa, q, k, v),
        "flash bf16": _flash(partial(sdpa, q, k, v)),
        "flash bf16, heads as rows": _flash(partial(grouped_sdpa, q, k, v)),
    }
    return [_baseline(name, k, v, run) for name, run in runs.items() if name == "sdpa bf16" or _runs(run)]


def dequantising_baseline(query: Tensor, keys: Tensor, values: Tensor, bits: int) -> Baseline:
    """Dequantise the whole layer to bfloat16, then run `sdpa`: transformers' quantised cache."""
    q = query.to(torch.bfloat16)
    k, v = (QuantisedTensor(_per_sequence(x, query), bits) for x in (keys, values))
    return Baseline("dequantise, sdpa bf16", bits, k.nbytes + v.nbytes, lambda: sdpa(q, k.dequantise(), v.dequantise()))


def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Run PyTorch's own attention with grouped queries -> [B, Hq, n, D].

    Args:
        keys, values: [B, Hkv, S, D], or [Hkv, S, D] of one sequence.
    """
    keys, values = (x if x.dim() == 4 else x[None] for x in (keys, values))
    return functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def grouped_sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Run it with the query heads of a KV head as rows, for keys and values [B, Hkv, S, D]."""
    rows = query.reshape(*keys.shape[:2], -1, query.shape[-1])  # [B, Hkv, G n, D]
    return functional.scaled_dot_product_attention(rows, keys, values).reshape(query.shape)


def matmul_attention(query: Tensor, transposed_keys: Tensor, values: Tensor) -> Tensor:
    """Run two batched products over the query heads of every KV head -> [B, Hq, n, D].

    Args:
        transposed_keys: [B, Hkv, D, S].
        values: [B, Hkv, S, D].
    """
    dim = query.shape[-1]
    grouped = query.reshape(-1, query.shape[1] // values.shape[1] * query.shape[2], dim)  # [B Hkv, G n, D]
    weights = torch.bmm(grouped * dim**-0.5, transposed_keys.flatten(0, 1)).softmax(-1)  # [B Hkv, G n, S]
    return torch.bmm(weights, values.flatten(0, 1)).view(query.shape)


class QuantisedTensor:
    """Packed codes with a scale and a zero point per 64 elements, unpacked as hqq does it."""

    def __init__(self, tensor: Tensor, bits: int) -> None:
        self._shape, self._bits = tensor.shape, bits
        groups = tensor.float().reshape(-1, GROUP)
        low, high = groups.aminmax(dim=1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-6)
        codes = ((groups - low) / scale).round().to(torch.uint8).unflatten(0, (8 // bits, -1))  # [codes per byte, N, 64]
        self._packed = torch.zeros_like(codes[0])
        for place, part in enumerate(codes):
            self._packed |= part << (place * bits)
        self._scale = scale.to(torch.bfloat16)
        self._zero = (-low / scale).to(torch.bfloat16)

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes + self._scale.nbytes + self._zero.nbytes

    def dequantise(self) -> Tensor:
        """Return the whole tensor in bfloat16."""
        mask = 2**self._bits - 1
        codes = torch.cat([(self._packed >> shift) & mask for shift in range(0, 8, self._bits)])  # [N, 64]
        return ((codes.to(torch.bfloat16) - self._zero) * self._scale).view(self._shape)


def _baseline(impl: str, keys: Tensor, values: Tensor, run: Callable[[], Tensor]) -> Baseline:
    return Baseline(impl, keys.element_size() * 8, keys.nbytes + values.nbytes, run)


def _per_sequence(tensor: Tensor, query: Tensor) -> Tensor:
    """Return keys or values [Hkv, S, D] of each sequence of a query, [B, Hkv, S, D]."""
    batch = query.shape[0]
    return tensor[None] if batch == 1 else tensor[None].expand(batch, *tensor.shape).contiguous()


def _flash(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the same, by flash attention or not at all."""

    def limited() -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return run()

    return limited


def _runs(run: Callable[[], Tensor]) -> bool:
    try:
        run()
    except RuntimeError:  # this build or this device has no such kernel
        return False
    return True
