"""Baselines for one layer's attention: PyTorch's fused kernel, matrix products, dequantising first.

All take a query [1, Hq, n, D], and keys and values [Hkv, S, D] that every row sees in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

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
        q, k, v = (tensor.to(dtype) for tensor in (query, keys, values))
        baselines.append(_baseline(f"sdpa {name}", k, v, partial(sdpa, q, k, v)))
        transposed = k.transpose(1, 2).contiguous()  # [Hkv, D, S]
        for layout, k_t in (("K", k.transpose(1, 2)), ("K^T", transposed)):
            baselines.append(_baseline(f"matmul {name}, {layout} contiguous", k, v, partial(matmul_attention, q, k_t, v)))
    return baselines


def dequantising_baseline(query: Tensor, keys: Tensor, values: Tensor, bits: int) -> Baseline:
    """Dequantise the whole layer to bfloat16, then run `sdpa`: transformers' quantised cache."""
    q = query.to(torch.bfloat16)
    k, v = QuantisedTensor(keys, bits), QuantisedTensor(values, bits)
    return Baseline("dequantise, sdpa bf16", bits, k.nbytes + v.nbytes, lambda: sdpa(q, k.dequantise(), v.dequantise()))


def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Run PyTorch's own attention with grouped queries -> [1, Hq, n, D]."""
    return functional.scaled_dot_product_attention(query, keys[None], values[None], enable_gqa=True)


def matmul_attention(query: Tensor, transposed_keys: Tensor, values: Tensor) -> Tensor:
    """Run two batched products over the query heads of every KV head -> [1, Hq, n, D].

    Args:
        transposed_keys: [Hkv, D, S].
    """
    heads, dim = transposed_keys.shape[:2]
    grouped = query.reshape(heads, -1, dim)  # [Hkv, G n, D]
    weights = torch.bmm(grouped * dim**-0.5, transposed_keys).softmax(-1)  # [Hkv, G n, S]
    return torch.bmm(weights, values).view(query.shape)


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
