"""Simulate variants of the method: those that were tried before it was built, and those left out.

    python benchmarks/code_variants.py [-m MODEL] [--text FILE ...] [--lengths 4000,5000]
                                       [--new 128] [--only NAME ...] [--json FILE]

Keys and values of a prompt are replaced by what a variant decodes to (nothing is packed). Then all
tokens of a continuation go through the model in one pass. Every row selects its own top-k from the
low-bit scores and swaps in the exact pairs, as policies `on-demand` and `verified` do step by step
(there a group becomes low-bit one step later). Prints the KL divergence from exact attention along
the given text, the bytes of low-bit copy and residual over those of an ordinary 16-bit cache, and
the mean pairs that a KV head swaps in per token. FILE is a result file of the board
(docs/results/).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from specache import reference
from specache.cache.window_layer import WindowLayer
from specache.cli.models import Dtype, load
from specache.engine.attention_hook import attached, forward
from specache.eval.origin import describe_origin
from specache.eval.prefilled import Prefilled
from specache.eval.run_summary import FORMAT
from specache.eval.tasks.documents import excerpts
from specache.kernels.types import AttentionParams

THREE_BITS = (0.2451, 0.7560, 1.3439, 2.1520)  # Lloyd-Max levels of a normal distribution; no code packs 3 bits


@dataclass(frozen=True)
class PromptFacts:
    """What a code may know of a layer's prompt.

    Attributes:
        weights: [Hkv, D] of the key channels, from the first `R + g` tokens.
        mass: [Hkv, S] attention that the prompt's last queries pay to each of its tokens.
    """

    weights: Tensor
    mass: Tensor


class Code(Protocol):
    """A code for keys and values at low bit."""

    def decoded(self, keys: Tensor, values: Tensor, prompt: PromptFacts, group: int) -> tuple[Tensor, Tensor]:
        """Return what keys and values [Hkv, S, D] decode to, in groups of `group` tokens."""

    def bits_per_element(self, dim: int, group: int) -> float:
        """Return the average bits of an element of keys and values, scales and means included."""


@dataclass(frozen=True)
class Rotated:
    """The rotated code and its variants. The shipped one has `key_bits` equal to `value_bits`."""

    key_bits: int
    value_bits: int
    weighted: bool = True
    unbiased_keys: bool = True
    unbiased_values: bool = True
    centred_values: bool = False

    def decoded(self, keys: Tensor, values: Tensor, prompt: PromptFacts, group: int) -> tuple[Tensor, Tensor]:
        turn = reference.rotation(keys.shape[-1])
        w = (prompt.weights if self.weighted else torch.ones_like(prompt.weights))[:, None, None]
        groups = keys.unflatten(1, (-1, group))  # [Hkv, S/g, g, D]
        mean = groups.mean(2, keepdim=True).half().float()
        low_keys = round_to_levels(((groups - mean) * w) @ turn.T, self.key_bits, self.unbiased_keys) @ turn / w + mean
        groups = values.unflatten(1, (-1, group))
        mean = groups.mean(2, keepdim=True).half().float() if self.centred_values else torch.zeros(())
        low_values = round_to_levels((groups - mean) @ turn.T, self.value_bits, self.unbiased_values) @ turn + mean
        return low_keys.flatten(1, 2), low_values.flatten(1, 2)

    def bits_per_element(self, dim: int, group: int) -> float:
        means = 2 if self.centred_values else 1
        return (self.key_bits + self.value_bits) / 2 + 16 / dim + means * 8 / group


@dataclass(frozen=True)
class Kivi:
    """KIVI's code."""

    bits: int

    def decoded(self, keys: Tensor, values: Tensor, prompt: PromptFacts, group: int) -> tuple[Tensor, Tensor]:
        low_keys = reference.dequantise_keys(*reference.quantise_keys(keys, self.bits, group), group)
        return low_keys, reference.dequantise_values(*reference.quantise_values(values, self.bits, group), group)

    def bits_per_element(self, dim: int, group: int) -> float:
        return self.bits + 16 / group + 16 / min(dim, group)


@dataclass(frozen=True)
class InTurn:
    """Two codes for alternating groups of tokens. Its bytes lie halfway between theirs."""

    codes: tuple[Code, Code]

    def decoded(self, keys: Tensor, values: Tensor, prompt: PromptFacts, group: int) -> tuple[Tensor, Tensor]:
        first = (torch.arange(keys.shape[1]) // group % 2 == 0)[:, None]
        parts = [code.decoded(keys, values, prompt, group) for code in self.codes]
        return torch.where(first, parts[0][0], parts[1][0]), torch.where(first, parts[0][1], parts[1][1])

    def bits_per_element(self, dim: int, group: int) -> float:
        return sum(code.bits_per_element(dim, group) for code in self.codes) / 2


@dataclass(frozen=True)
class SplitKeys:
    """The rotated code, with the key channels of each KV head in two parts with their own bits.

    Each part is rotated and scaled by itself. `by` chooses the first part: `slow` takes the pairs
    of channels that RoPE turns slowest, `fast` those that it turns fastest, and `loud` the channels
    with the largest weighted norm in the first group.

    Attributes:
        bits: of the first and of the second part.
        share: of the channels that are in the first part.
    """

    by: str
    bits: tuple[int, int]
    share: float
    value_bits: int = 2

    def decoded(self, keys: Tensor, values: Tensor, prompt: PromptFacts, group: int) -> tuple[Tensor, Tensor]:
        _, low_values = Rotated(self.value_bits, self.value_bits).decoded(keys, values, prompt, group)
        w = prompt.weights[:, None, None]
        groups = keys.unflatten(1, (-1, group))
        mean = groups.mean(2, keepdim=True).half().float()
        centred = (groups - mean) * w
        low_keys = torch.empty_like(centred)
        for head in range(keys.shape[0]):
            order = self._order(centred[head, 0])
            for channels, bits in zip(order.tensor_split([round(self.share * len(order))]), self.bits, strict=True):
                turn = reference.rotation(len(channels))
                low_keys[head][..., channels] = round_to_levels(centred[head][..., channels] @ turn.T, bits, True) @ turn
        return (low_keys / w + mean).flatten(1, 2), low_values

    def _order(self, first_group: Tensor) -> Tensor:
        dim = first_group.shape[-1]
        if self.by == "loud":
            return first_group.square().sum(0).argsort(descending=True)
        pairs = torch.arange(dim // 2)  # channels c and c + D/2 turn together, the first pairs fastest
        pairs = pairs.flip(0) if self.by == "slow" else pairs
        return torch.stack([pairs, pairs + dim // 2], dim=-1).flatten()

    def bits_per_element(self, dim: int, group: int) -> float:
        keys = self.share * self.bits[0] + (1 - self.share) * self.bits[1] + 32 / dim + 16 / group
        return (keys + self.value_bits + 16 / dim) / 2


@dataclass(frozen=True)
class SecondCode:
    """The rotated code, and one more bit per element for the groups with the most attention.

    The second code is of what the first leaves over: one sign per element and one scale per token.

    Attributes:
        bits: of the first code.
        share: of the groups that have a second one.
    """

    bits: int
    share: float

    def decoded(self, keys: Tensor, values: Tensor, prompt: PromptFacts, group: int) -> tuple[Tensor, Tensor]:
        turn = reference.rotation(keys.shape[-1])
        w = prompt.weights[:, None, None]
        groups = keys.unflatten(1, (-1, group))
        mean = groups.mean(2, keepdim=True).half().float()
        chosen = self._chosen(prompt.mass, groups.shape[1], group)
        low_keys = self._rounded(((groups - mean) * w) @ turn.T, chosen) @ turn / w + mean
        low_values = self._rounded(values.unflatten(1, (-1, group)) @ turn.T, chosen) @ turn
        return low_keys.flatten(1, 2), low_values.flatten(1, 2)

    def _chosen(self, mass: Tensor, count: int, group: int) -> Tensor:
        """Return the mask [Hkv, count, 1, 1] of the groups that have a second code."""
        whole = torch.nn.functional.pad(mass, (0, max(0, count * group - mass.shape[1])))[:, : count * group]
        of_group = whole.unflatten(1, (count, group)).sum(-1)  # groups of new tokens count from zero
        best = of_group.topk(round(self.share * count), dim=-1).indices
        return torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)[..., None, None]

    def _rounded(self, rotated_rows: Tensor, chosen: Tensor) -> Tensor:
        nearest = round_to_levels(rotated_rows, self.bits, unbiased=False)
        both = nearest + round_to_levels(rotated_rows - nearest, 1, unbiased=False)
        norm = rotated_rows.square().sum(-1, keepdim=True)
        both = both * (norm / (rotated_rows * both).sum(-1, keepdim=True).clamp(min=1e-20))
        return torch.where(chosen, both, round_to_levels(rotated_rows, self.bits, unbiased=True))

    def bits_per_element(self, dim: int, group: int) -> float:
        one = Rotated(self.bits, self.bits).bits_per_element(dim, group)
        return one + self.share * (1 + 16 / dim)


def round_to_levels(rotated_rows: Tensor, bits: int, unbiased: bool) -> Tensor:
    """Round rows to the nearest normal levels times one scale per row.

    The scale is unbiased, or minimises the squared error.
    """
    levels = torch.tensor([-x for x in reversed(THREE_BITS)] + list(THREE_BITS)) if bits == 3 else reference.normal_levels(bits)
    unit = rotated_rows / rotated_rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)
    chosen = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
    product = (rotated_rows * chosen).sum(-1, keepdim=True)
    if unbiased:
        return chosen * (rotated_rows.square().sum(-1, keepdim=True) / product.clamp(min=1e-20)).half().float()
    return chosen * (product / chosen.square().sum(-1, keepdim=True)).half().float()


Masses = dict[int, Tensor]  # layer -> attention probabilities [Hkv, n, L] of the tokens at low bit
Budgets = dict[int, Tensor]  # layer -> pairs to swap in [Hkv, n]


def by_mass(masses: Masses, top_k: int) -> Budgets:
    """Divide all pairs in proportion to the attention that each head pays to low-bit tokens."""
    mass = torch.stack([one.sum(-1) for one in masses.values()])  # [layers, Hkv, n]
    ends = (mass / mass.sum((0, 1), keepdim=True)).flatten(0, 1).cumsum(0) * (top_k * mass[..., 0].numel())
    budgets = ends.round().diff(dim=0, prepend=torch.zeros_like(ends[:1])).long().unflatten(0, mass.shape[:2])
    return dict(zip(masses, budgets, strict=True))


def by_rank(masses: Masses, top_k: int) -> Budgets:
    """Choose as many pairs as `by_mass`: those with the most attention over all heads and layers.

    This minimises the attention that stays at low bit.
    """
    mass = torch.stack(list(masses.values()))  # [layers, Hkv, n, L]
    pairs = mass.movedim(2, 0).flatten(1)  # [n, layers * Hkv * L]
    least = pairs.topk(min(top_k * mass[..., 0, 0].numel(), pairs.shape[1]), dim=-1).values[:, -1]  # [n]
    return dict(zip(masses, (mass >= least[:, None]).sum(-1), strict=True))


def until_covered(left: float, floor: int, most: int) -> Spread:
    """Return a spread that swaps in pairs until `left` of a head's attention stays at low bit.

    It takes at least `floor` and at most `most` pairs. `top_k` is ignored.
    """

    def spread(masses: Masses, top_k: int) -> Budgets:
        budgets: Budgets = {}
        for layer, mass in masses.items():
            largest = mass.topk(min(most, mass.shape[-1]), dim=-1).values
            stays = mass.sum(-1, keepdim=True) - largest.cumsum(-1)
            budgets[layer] = (1 + (stays > left).sum(-1)).clamp(floor, most)
        return budgets

    return spread


def of_the_last_step(spread: Spread) -> Spread:
    """Return `spread` one step late: budgets that a decoder knows before its first layer."""

    def spread_late(masses: Masses, top_k: int) -> Budgets:
        return {layer: torch.cat([k[:, :1], k[:, :-1]], dim=1) for layer, k in spread(masses, top_k).items()}

    return spread_late


Spread = Callable[[Masses, int], Budgets]


@dataclass(frozen=True)
class Variant:
    """A code, and which pairs are swapped in.

    Attributes:
        top_k: pairs per KV head and row.
        spread: divides the pairs over layers and heads, or `None` for `top_k` in every one.
        residual, group: `R` and `g`.
    """

    code: Code
    top_k: int
    spread: Spread | None = None
    residual: int = 64
    group: int = 64

    def low_bit_length(self, length: int) -> int:
        """Return how many of `length` tokens are at low bit."""
        return max(0, length - self.residual) // self.group * self.group

    def memory(self, length: int, dim: int) -> float:
        """Return the bytes of low-bit copy and residual over those of a 16-bit cache."""
        low = self.low_bit_length(length)
        return (low * self.code.bits_per_element(dim, self.group) / 16 + length - low) / length


def covering(left: float, floor: int, most: int, bits: int) -> Variant:
    return Variant(Rotated(bits, bits), most, until_covered(left, floor, most))


ONE, TWO = Rotated(1, 1), Rotated(2, 2)
VARIANTS: dict[str, Variant] = {
    "2-bit kivi, k=64": Variant(Kivi(2), 64),
    "2-bit rotated, k=64": Variant(TWO, 64),
    "2-bit rotated, k=128": Variant(TWO, 128),
    "2-bit rotated, no weights, k=64": Variant(Rotated(2, 2, weighted=False), 64),
    "2-bit rotated, least-squares keys, k=64": Variant(Rotated(2, 2, unbiased_keys=False), 64),
    "2-bit rotated, least-squares values, k=64": Variant(Rotated(2, 2, unbiased_values=False), 64),
    "2-bit rotated, centred values, k=64": Variant(Rotated(2, 2, centred_values=True), 64),
    "1-bit kivi, k=128": Variant(Kivi(1), 128),
    "1-bit rotated, k=128": Variant(ONE, 128),
    "1-bit rotated, centred values, k=128": Variant(Rotated(1, 1, centred_values=True), 128),
    "2-bit keys, 1-bit values, k=128": Variant(Rotated(2, 1), 128),
    "1-bit keys, 2-bit values, k=128": Variant(Rotated(1, 2), 128),
    "groups at 2 bits and 1 bit in turn, k=128": Variant(InTurn((TWO, ONE)), 128),
    "3-bit keys, 1-bit values, k=64": Variant(Rotated(3, 1), 64),
    "1-bit keys, 3-bit values, k=64": Variant(Rotated(1, 3), 64),
    "3-bit rotated, k=64": Variant(Rotated(3, 3), 64),
    "4-bit keys, 2-bit values, k=64": Variant(Rotated(4, 2), 64),
    "2-bit keys, 4-bit values, k=64": Variant(Rotated(2, 4), 64),
    "2-bit rotated, k=64 by mass": Variant(TWO, 64, by_mass),
    "2-bit rotated, k=64 by rank": Variant(TWO, 64, by_rank),
    "2-bit rotated, k=64 by rank in the last step": Variant(TWO, 64, of_the_last_step(by_rank)),
    "1-bit rotated, k=128 by mass": Variant(ONE, 128, by_mass),
    "1-bit rotated, k=128 by rank": Variant(ONE, 128, by_rank),
    "1-bit rotated, k=128 by rank in the last step": Variant(ONE, 128, of_the_last_step(by_rank)),
    "2-bit rotated, k=64, g=32, R=32": Variant(TWO, 64, residual=32, group=32),
    "2-bit rotated, k=64, g=32, R=64": Variant(TWO, 64, residual=64, group=32),
    "2-bit rotated, k=64, g=64, R=16": Variant(TWO, 64, residual=16),
    "2-bit rotated, k=64, g=64, R=128": Variant(TWO, 64, residual=128),
    "1-bit rotated, k=128, g=32, R=32": Variant(ONE, 128, residual=32, group=32),
    "2-bit rotated, k=96": Variant(TWO, 96),
    "2-bit rotated, k=96, R=128": Variant(TWO, 96, residual=128),
    "2-bit rotated, k=128, R=128": Variant(TWO, 128, residual=128),
    "2-bit rotated, k=128, R=32": Variant(TWO, 128, residual=32),
    "2-bit rotated, 32 to 256 pairs until 5% is left": covering(0.05, 32, 256, 2),
    "2-bit rotated, 64 to 256 pairs until 5% is left": covering(0.05, 64, 256, 2),
    "2-bit rotated, 32 to 256 pairs until 10% is left": covering(0.10, 32, 256, 2),
    "2-bit, slow half of RoPE at 3, fast half at 1, k=64": Variant(SplitKeys("slow", (3, 1), 0.5), 64),
    "2-bit, fast half of RoPE at 3, slow half at 1, k=64": Variant(SplitKeys("fast", (3, 1), 0.5), 64),
    "2-bit, both halves of RoPE at 2, k=64": Variant(SplitKeys("slow", (2, 2), 0.5), 64),
    "2-bit, an eighth of key channels at 4, k=64": Variant(SplitKeys("loud", (4, 2), 0.125), 64),
    "2-bit, a second code for a quarter of groups, k=64": Variant(SecondCode(2, 0.25), 64),
    "1-bit rotated, k=256": Variant(ONE, 256),
    "1-bit rotated, k=256, R=128": Variant(ONE, 256, residual=128),
    "1-bit rotated, k=256, R=256": Variant(ONE, 256, residual=256),
    "1-bit rotated, centred values, k=256, R=256": Variant(Rotated(1, 1, centred_values=True), 256, residual=256),
    "1-bit rotated, 64 to 512 pairs until 20% is left": covering(0.20, 64, 512, 1),
    "1-bit, a second code for a quarter of groups, k=128": Variant(SecondCode(1, 0.25), 128),
    "1-bit, a second code for a quarter of groups, k=256, R=128": Variant(SecondCode(1, 0.25), 256, residual=128),
    "1-bit, a second code for half of the groups, k=256": Variant(SecondCode(1, 0.5), 256),
    "1-bit, slow half of RoPE at 2, fast at 1, k=128": Variant(SplitKeys("slow", (2, 1), 0.5, 1), 128),
    "1-bit, an eighth of key channels at 4, k=128": Variant(SplitKeys("loud", (4, 1), 0.125, 1), 128),
}


@dataclass
class Simulation:
    """A forward pass over `n` known tokens after a prompt, with a variant's keys and values."""

    prompt: Prefilled
    windows: dict[int, WindowLayer]
    variant: Variant | None  # None: exact
    budgets: Budgets = field(default_factory=dict)  # empty: `top_k` for every head
    facts: dict[int, PromptFacts] = field(default_factory=dict)
    masses: Masses = field(default_factory=dict)

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        if index in self.windows:
            return self.windows[index].prefill(query[0], keys[0], values[0], params).transpose(0, 1)[None]
        stored_keys, stored_values = self.prompt.rows(index)
        k = torch.cat([stored_keys, keys[0]], dim=1).float()  # [Hkv, T, D]
        v = torch.cat([stored_values, values[0]], dim=1).float()
        out = self._mixed(index, query[0].float().unflatten(0, (k.shape[0], -1)), k, v, params)
        return out.flatten(0, 1).transpose(0, 1)[None]

    def _mixed(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Attend with query [Hkv, G, n, D] -> [Hkv, G, n, D]."""
        start, n, total = self.prompt.length, query.shape[2], keys.shape[1]
        exact = capped(query @ keys[:, None].transpose(-1, -2) * params.scaling, params)  # [Hkv, G, n, T]
        column = torch.arange(total)
        hidden = column > torch.arange(start, start + n)[:, None]
        if self.variant is None:
            return exact.masked_fill(hidden, -torch.inf).softmax(-1) @ values[:, None]
        lengths = torch.tensor([self.variant.low_bit_length(start + i + 1) for i in range(n)])
        longest = int(lengths.max())
        low_keys, low_values = self.variant.code.decoded(
            keys[:, :longest], values[:, :longest], self.facts[index], self.variant.group
        )
        low = (column < lengths[:, None])[..., :longest]  # [n, L]
        mixed = exact.clone()
        scores = capped(query @ low_keys[:, None].transpose(-1, -2) * params.scaling, params)
        mixed[..., :longest] = torch.where(low, scores, mixed[..., :longest])
        mass = mixed.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)[..., :longest]  # [Hkv, n, L]
        if self.variant.spread is not None and not self.budgets:
            self.masses[index] = mass * low
        stays_low = (low & ~self._chosen(index, mass.masked_fill(~low, -1.0)))[:, None]  # [Hkv, 1, n, L]
        mixed[..., :longest] = torch.where(stays_low, mixed[..., :longest], exact[..., :longest])
        p = mixed.masked_fill(hidden, -torch.inf).softmax(-1)
        out = (p[..., :longest] * stays_low) @ low_values[:, None]
        p[..., :longest] *= ~stays_low
        return out + p @ values[:, None]

    def _chosen(self, index: int, mass: Tensor) -> Tensor:
        """Return the mask [Hkv, n, L] of the pairs of a layer that are swapped in."""
        assert self.variant is not None
        budget = self.budgets.get(index, torch.full(mass.shape[:2], self.variant.top_k))  # [Hkv, n]
        most = min(int(budget.max()), mass.shape[2])
        within = torch.arange(most) < budget[..., None]
        return torch.zeros_like(mass, dtype=torch.bool).scatter_(2, mass.topk(most, dim=-1).indices, within)


def capped(scores: Tensor, params: AttentionParams) -> Tensor:
    return scores if params.softcap is None else params.softcap * torch.tanh(scores / params.softcap)


def last_mass(keys: Tensor, queries: Tensor, last: int = 64) -> Tensor:
    """Return the attention [Hkv, S] of a prompt's `last` queries.

    Queries [Hq, S, D], keys [Hkv, S, D].
    """
    newest = queries[:, -last:].float().unflatten(0, (keys.shape[0], -1))  # [Hkv, G, last, D]
    scores = newest @ keys.float()[:, None].transpose(-1, -2) * keys.shape[-1] ** -0.5
    return scores.softmax(-1).mean((1, 2))


def log_probs(model: Any, prompt: Prefilled, following: list[int], variant: Variant | None) -> Tensor:
    """Return the log-probabilities [n, V] after each token of a continuation."""
    return simulate(model, prompt, following, variant)[0]


def simulate(model: Any, prompt: Prefilled, following: list[int], variant: Variant | None) -> tuple[Tensor, float]:
    """Return the log-probabilities [n, V] after each token of a continuation, and pairs."""
    simulation = Simulation(prompt, prompt.windows(), variant)
    if variant is not None:
        prefix = variant.residual + variant.group  # tokens that the key weights are computed from
        for layer in prompt.full_layers:
            keys, _ = prompt.rows(layer)
            queries = prompt.queries(layer)[:, :prefix].unflatten(0, (keys.shape[0], -1))
            weights = reference.key_weights(queries, keys[:, :prefix])
            simulation.facts[layer] = PromptFacts(weights, last_mass(keys, prompt.queries(layer)))
    positions = torch.arange(prompt.length, prompt.length + len(following))[None]
    with torch.no_grad(), attached(model):
        logits = forward(model, torch.tensor([following]), positions, simulation, logits=len(following))[0]
        if variant is not None and variant.spread is not None:  # second pass, with budgets from the first
            simulation.budgets = variant.spread(simulation.masses, variant.top_k)
            simulation.windows = prompt.windows()
            logits = forward(model, torch.tensor([following]), positions, simulation, logits=len(following))[0]
    budgets = [budget.float().mean() for budget in simulation.budgets.values()]
    pairs = float(sum(budgets) / len(budgets)) if budgets else float(variant.top_k if variant else 0)
    return logits.log_softmax(-1), pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="documents; default: Python's own help topics")
    parser.add_argument("--lengths", default="4000,5000", help="tokens of each document")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as a result file of the board")
    options = parser.parse_args()
    loaded = load(options.model, dtype=Dtype.FLOAT32)
    divergence: dict[str, list[Tensor]] = {name: [] for name in options.only}
    memory: dict[str, list[float]] = {name: [] for name in options.only}
    pairs: dict[str, list[float]] = {name: [] for name in options.only}
    for excerpt in excerpts(loaded.tokenizer, tuple(options.text), list(map(int, options.lengths.split(","))), options.new, 0):
        prompt = Prefilled(loaded.model, loaded.tokenizer(excerpt.document)["input_ids"], all_queries=True)
        following = loaded.tokenizer(excerpt.following, add_special_tokens=False)["input_ids"][: options.new]
        expected = log_probs(loaded.model, prompt, following, None)
        dim = prompt.rows(prompt.full_layers[0])[0].shape[-1]
        for name in options.only:
            actual, swapped = simulate(loaded.model, prompt, following, VARIANTS[name])
            pairs[name].append(swapped)
            divergence[name].append((expected.exp() * (expected - actual)).sum(-1))
            memory[name].append(VARIANTS[name].memory(prompt.length, dim))
        prompt.close()
    rows = [
        {
            "variant": name,
            "mean": float(torch.cat(divergence[name]).mean()),
            "p95": float(torch.cat(divergence[name]).quantile(0.95)),
            "p99": float(torch.cat(divergence[name]).quantile(0.99)),
            "memory": sum(memory[name]) / len(memory[name]),
            "pairs": sum(pairs[name]) / len(pairs[name]),
        }
        for name in options.only
    ]
    for row in rows:
        tail = f"p95 {row['p95']:.5f}  p99 {row['p99']:.5f}"
        print(f"{row['variant']:58} mean {row['mean']:.5f}  {tail}  memory {row['memory']:.3f}x  pairs {row['pairs']:.0f}")
    if options.json:
        command = (
            f"python benchmarks/code_variants.py -m {Path(options.model).name} --lengths {options.lengths} --new {options.new}"
        )
        document = {"format": FORMAT, "task": "code-variants", "model": Path(options.model).name, "command": command}
        options.json.write_text(json.dumps({**document, "origins": [describe_origin()], "variants": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
