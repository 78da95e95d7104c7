"""Variants of the low-bit code, simulated: what was tried before `--code rotated` was built.

    python benchmarks/code_variants.py [-m MODEL] [--text FILE ...] [--lengths 4000,5000] [--new 128] [--only NAME ...]

Keys and values of a prompt are replaced by what a variant decodes to (nothing is packed), then all tokens of a continuation go
through the model in one pass: every row selects its own top-k from the low-bit scores and swaps in the exact pairs, as policies
`on-demand` and `verified` do step by step. Prints the KL divergence from exact attention along the given text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specache import reference
from specache.cli.models import Dtype, load
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.documents import excerpts
from specache.exact import AttentionParams
from specache.integration import attached, forward
from specache.layers import WindowLayer

RESIDUAL = GROUP = 64
PREFIX = RESIDUAL + GROUP  # tokens that key weights are made from
Code = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (keys, values, weights) -> what they decode to


def rotated(
    bits: int,
    *,
    weighted: bool = True,
    unbiased_keys: bool = True,
    unbiased_values: bool = True,
    centred_values: bool = False,
    value_bits: int | None = None,
) -> Code:
    """The rotated code and its variants; the shipped one is `rotated(bits)`."""

    def code(keys: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        turn = reference.rotation(keys.shape[-1])
        w = (weights if weighted else torch.ones_like(weights))[:, None, None]
        groups = keys.unflatten(1, (-1, GROUP))  # [Hkv, S/g, g, D]
        mean = groups.mean(2, keepdim=True).half().float()
        low_keys = round_to_levels(((groups - mean) * w) @ turn.T, bits, unbiased_keys) @ turn / w + mean
        groups = values.unflatten(1, (-1, GROUP))
        mean = groups.mean(2, keepdim=True).half().float() if centred_values else torch.zeros(())
        low_values = round_to_levels((groups - mean) @ turn.T, value_bits or bits, unbiased_values) @ turn + mean
        return low_keys.flatten(1, 2), low_values.flatten(1, 2)

    return code


def round_to_levels(rotated_rows: Tensor, bits: int, unbiased: bool) -> Tensor:
    """Nearest normal levels times one scale per row: unbiased, or least-squares."""
    levels = reference.normal_levels(bits)
    unit = rotated_rows / rotated_rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)
    chosen = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
    product = (rotated_rows * chosen).sum(-1, keepdim=True)
    if unbiased:
        return chosen * (rotated_rows.square().sum(-1, keepdim=True) / product.clamp(min=1e-20)).half().float()
    return chosen * (product / chosen.square().sum(-1, keepdim=True)).half().float()


def kivi(bits: int) -> Code:
    """KIVI's code."""

    def code(keys: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        low_keys = reference.dequantise_keys(*reference.quantise_keys(keys, bits, GROUP), GROUP)
        return low_keys, reference.dequantise_values(*reference.quantise_values(values, bits, GROUP), GROUP)

    return code


VARIANTS: dict[str, tuple[Code, int]] = {  # name -> (code, k)
    "2-bit kivi, k=64": (kivi(2), 64),
    "2-bit rotated, k=64": (rotated(2), 64),
    "2-bit rotated, k=128": (rotated(2), 128),
    "2-bit rotated, no weights, k=64": (rotated(2, weighted=False), 64),
    "2-bit rotated, least-squares keys, k=64": (rotated(2, unbiased_keys=False), 64),
    "2-bit rotated, least-squares values, k=64": (rotated(2, unbiased_values=False), 64),
    "2-bit rotated, centred values, k=64": (rotated(2, centred_values=True), 64),
    "1-bit kivi, k=128": (kivi(1), 128),
    "1-bit rotated, k=128": (rotated(1), 128),
    "1-bit rotated, centred values, k=128": (rotated(1, centred_values=True), 128),
    "2-bit keys, 1-bit values, k=128": (rotated(2, value_bits=1), 128),
}


@dataclass
class Simulation:
    """A forward pass over `n` known tokens after a prompt, with a variant's decoded keys and values."""

    prompt: Prefilled
    windows: dict[int, WindowLayer]
    code: Code | None  # None: exact
    top_k: int
    weights: dict[int, Tensor] = field(default_factory=dict)

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        if index in self.windows:
            return self.windows[index].prefill(query[0], keys[0], values[0], params).transpose(0, 1)[None]
        stored_keys, stored_values = self.prompt.rows(index)
        k = torch.cat([stored_keys, keys[0]], dim=1).float()  # [Hkv, T, D]
        v = torch.cat([stored_values, values[0]], dim=1).float()
        out = self._mixed(index, query[0].float().unflatten(0, (k.shape[0], -1)), k, v, params)
        return out.flatten(0, 1).transpose(0, 1)[None]

    def _mixed(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """query [Hkv, G, n, D] -> [Hkv, G, n, D]."""
        start, n, total = self.prompt.length, query.shape[2], keys.shape[1]
        lengths = torch.tensor([max(0, start + i + 1 - RESIDUAL) // GROUP * GROUP for i in range(n)])
        longest = int(lengths.max()) if self.code is not None else 0
        exact = capped(query @ keys[:, None].transpose(-1, -2) * params.scaling, params)  # [Hkv, G, n, T]
        column = torch.arange(total)
        hidden = column > torch.arange(start, start + n)[:, None]
        if not longest or self.code is None:
            return exact.masked_fill(hidden, -torch.inf).softmax(-1) @ values[:, None]
        low_keys, low_values = self.code(keys[:, :longest], values[:, :longest], self.weights[index])
        low = (column < lengths[:, None])[..., :longest]  # [n, L]
        mixed = exact.clone()
        scores = capped(query @ low_keys[:, None].transpose(-1, -2) * params.scaling, params)
        mixed[..., :longest] = torch.where(low, scores, mixed[..., :longest])
        mass = mixed.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)[..., :longest].masked_fill(~low, -1.0)  # [Hkv, n, L]
        chosen = torch.zeros_like(mass, dtype=torch.bool).scatter_(2, mass.topk(min(self.top_k, longest), dim=-1).indices, True)
        stays_low = (low & ~chosen)[:, None]  # [Hkv, 1, n, L]
        mixed[..., :longest] = torch.where(stays_low, mixed[..., :longest], exact[..., :longest])
        p = mixed.masked_fill(hidden, -torch.inf).softmax(-1)
        out = (p[..., :longest] * stays_low) @ low_values[:, None]
        p[..., :longest] *= ~stays_low
        return out + p @ values[:, None]


def capped(scores: Tensor, params: AttentionParams) -> Tensor:
    return scores if params.softcap is None else params.softcap * torch.tanh(scores / params.softcap)


def log_probs(model: Any, prompt: Prefilled, following: list[int], code: Code | None, top_k: int) -> Tensor:
    """Log-probabilities [n, V] after each token of a continuation."""
    simulation = Simulation(prompt, prompt.windows(), code, top_k)
    for layer in prompt.full_layers:
        keys, _ = prompt.rows(layer)
        queries = prompt.queries(layer)[:, :PREFIX].unflatten(0, (keys.shape[0], -1))
        simulation.weights[layer] = reference.key_weights(queries, keys[:, :PREFIX])
    positions = torch.arange(prompt.length, prompt.length + len(following))[None]
    with torch.no_grad(), attached(model):
        return forward(model, torch.tensor([following]), positions, simulation, logits=len(following))[0].log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="documents; default: Python's own help topics")
    parser.add_argument("--lengths", default="4000,5000", help="tokens of each document")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    options = parser.parse_args()
    loaded = load(options.model, dtype=Dtype.FLOAT32)
    divergence: dict[str, list[Tensor]] = {name: [] for name in options.only}
    for excerpt in excerpts(loaded.tokenizer, tuple(options.text), list(map(int, options.lengths.split(","))), options.new, 0):
        prompt = Prefilled(loaded.model, loaded.tokenizer(excerpt.document)["input_ids"], all_queries=True)
        following = loaded.tokenizer(excerpt.following, add_special_tokens=False)["input_ids"][: options.new]
        expected = log_probs(loaded.model, prompt, following, None, 0)
        for name in options.only:
            code, top_k = VARIANTS[name]
            actual = log_probs(loaded.model, prompt, following, code, top_k)
            divergence[name].append((expected.exp() * (expected - actual)).sum(-1))
        prompt.close()
    for name, values in divergence.items():
        joined = torch.cat(values)
        print(f"{name:44} mean {joined.mean():.5f}  p95 {joined.quantile(0.95):.5f}  p99 {joined.quantile(0.99):.5f}")


if __name__ == "__main__":
    main()
