"""The oracle: Algorithms 1-3 of SpeCache (arXiv 2503.16163) in plain PyTorch.

One sequence, dense tensors, codes one per byte, no pages, no tiers, unchunked prefill, all
attention maths in float32. Nothing of the fast implementation is imported, so that agreement is
evidence.

Symbols: `Hq` query heads, `Hkv` key-value heads, `G = Hq / Hkv`, `n` committed tokens, `q` tokens
of a pass, `D` head dimension, `b` bits, `g` group size, `R` residual, `k` fetched pairs per KV
head, `L(n)` tokens held at low bit. A position is also the column of its token in every `[.., n]`
tensor.

Order: quantisation, attention and selection, the algorithms in one layer (`Layer`), the hook into a
transformers model, generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from specache.config import Code, Policy, SpeCacheConfig, TopK
from specache.errors import UnsupportedModelError, UsageError
from specache.model.positions import max_positions

NAME = "specache_reference"  # names the attention and mask functions, and the keyword argument of the state
FLOAT16_MAX = torch.finfo(torch.float16).max


def quantise_groups(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups as KIVI (arXiv 2402.02750), along the second last axis of `x [.., group, C]`.

    `b >= 2`: `z = min X`, `s = (max X - min X) / (2^b - 1)`; `b = 1`: `z = (3 min X + max X) / 4`,
    `s = (max X - min X) / 2` (SpeCache's quarter points). Then `code = clamp(round((x - z) / s), 0,
    2^b - 1)` from the rounded `z` and `s`. Returns codes uint8 `[.., group, C]`, scale and zero
    point float16 `[.., C]`.
    """
    x = x.float()
    low, high = x.amin(dim=-2), x.amax(dim=-2)  # [.., C]
    zero = (3 * low + high) / 4 if bits == 1 else low
    scale = (high - low) / 2 if bits == 1 else (high - low) / (2**bits - 1)
    zero, scale = (t.clamp(-FLOAT16_MAX, FLOAT16_MAX).half() for t in (zero, scale))
    z, s = zero.float().unsqueeze(-2), scale.float().unsqueeze(-2)  # [.., 1, C]
    steps = torch.where(s > 0, (x - z) / s, 0.0)  # a constant group: s = 0, codes 0, never NaN
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8), scale, zero


def quantise_keys(keys: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise keys `[Hkv, n, D]` per channel, over whole groups of `g` consecutive tokens.

    Returns codes uint8 `[Hkv, n, D]`, scale and zero point float16 `[Hkv, n/g, D]`.
    """
    if keys.shape[1] % group_size:
        raise UsageError(f"Keys are quantised in whole groups of {group_size} tokens, got {keys.shape[1]} tokens.")
    groups = keys.unflatten(1, (keys.shape[1] // group_size, group_size))  # [Hkv, n/g, g, D]
    codes, scale, zero = quantise_groups(groups, bits)
    return codes.flatten(1, 2), scale, zero


def dequantise_keys(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """Return `z + s * code`: float32 keys `[Hkv, n, D]` from the result of `quantise_keys`."""
    z, s = (t.float().repeat_interleave(group_size, dim=1) for t in (zero, scale))  # [Hkv, n, D]
    return z + s * codes


def quantise_values(values: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise values `[Hkv, n, D]` per token, over groups of at most `g` consecutive channels.

    Returns codes uint8 `[Hkv, n, D]`, scale and zero point float16 `[Hkv, n, ceil(D/g)]`.
    """
    groups = [quantise_groups(x.unsqueeze(-1), bits) for x in values.split(group_size, dim=-1)]  # x [Hkv, n, <=g]
    codes, scale, zero = zip(*groups, strict=True)
    return torch.cat(codes, dim=-2).squeeze(-1), torch.cat(scale, dim=-1), torch.cat(zero, dim=-1)


def dequantise_values(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """Return `z + s * code`: float32 values `[Hkv, n, D]` from the result of `quantise_values`."""
    channels = codes.shape[-1]
    z, s = (t.float().repeat_interleave(group_size, dim=-1)[..., :channels] for t in (zero, scale))  # [Hkv, n, D]
    return z + s * codes


def normal_levels(bits: int) -> Tensor:
    """Return the Lloyd-Max levels of a standard normal distribution (Max, 1960), float32 `[2^b]`.

    They ascend, and are rounded to integer multiples of one unit.
    """
    steps = {1: [1], 2: [3, 10], 4: [3, 9, 15, 22, 29, 37, 48, 63]}[bits]
    unit = {1: 0.7979, 2: 0.151, 4: 2.733 / 63}[bits]
    half = [unit * step for step in steps]
    return torch.tensor([-x for x in reversed(half)] + half, dtype=torch.float32)


def rotation(dim: int) -> Tensor:
    """Return `R [D, D]`: fixed random signs, then a Walsh-Hadamard transform.

    If `D` is no power of two, its binary digits give the sizes of blocks that are transformed each.
    """
    signs = torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(0x5BECAC4E)).float() * 2.0 - 1.0
    sizes = [1 << i for i in reversed(range(dim.bit_length())) if dim >> i & 1]
    parts = torch.diag(signs).split(sizes, dim=-1)  # the signed unit vectors, one per row
    return torch.cat([walsh_hadamard(part) / part.shape[-1] ** 0.5 for part in parts], dim=-1).T


def walsh_hadamard(x: Tensor) -> Tensor:
    """Return the unnormalised Walsh-Hadamard transform of the last axis, of length 2^m."""
    if x.shape[-1] == 1:
        return x
    a, b = (walsh_hadamard(half) for half in x.chunk(2, dim=-1))
    return torch.cat([a + b, a - b], dim=-1)


def quantise_rotated(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """**Ours.** Rotate each vector `x [.., D]`, then round it to the normal levels times a scale.

    `code` is the nearest level of `R x / rms(x)`. The scale `|R x|^2 / <R x, levels[code]>` makes a
    vector's inner product with its decoded self exact. Returns codes int64 `[.., D]` and scale
    float16 `[.., 1]`.
    """
    y = x.float() @ rotation(x.shape[-1]).T
    levels = normal_levels(bits)
    unit = y / y.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)
    codes = (unit.unsqueeze(-1) - levels).abs().argmin(dim=-1)
    scale = y.square().sum(dim=-1, keepdim=True) / (y * levels[codes]).sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return codes, scale.clamp(max=FLOAT16_MAX).half()


def rotated_low_bit_kv(keys: Tensor, values: Tensor, weights: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Quantise keys and values `[Hkv, n, D]` (whole groups) with the rotated code, and decode them.

    Before the rotation, keys lose their mean per channel and group, and are multiplied by `weights
    [Hkv, D]`.
    """
    levels, back = normal_levels(bits), rotation(keys.shape[-1])  # R^T y, for vectors that are rows
    codes, scale = quantise_rotated(values, bits)
    decoded_values = (scale.float() * levels[codes]) @ back
    groups = keys.float().unflatten(1, (-1, group_size))  # [Hkv, n/g, g, D]
    mean = groups.mean(dim=2, keepdim=True).clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()  # [Hkv, n/g, 1, D]
    w = weights[:, None, None]  # [Hkv, 1, 1, D]
    codes, scale = quantise_rotated((groups - mean) * w, bits)
    decoded_keys = (scale.float() * levels[codes]) @ back / w + mean
    return decoded_keys.flatten(1, 2), decoded_values


def key_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """**Ours.** Return `sqrt(rms(q_c) / rms(k_c - mean))` per KV head and channel, over the median.

    From a prefix's queries `[Hkv, G, m, D]` and keys `[Hkv, m, D]` -> float32 `[Hkv, D]`.
    """
    query_rms = queries.float().square().mean(dim=(1, 2)).sqrt().clamp(min=1e-6)
    key_rms = (keys.float() - keys.float().mean(dim=1, keepdim=True)).square().mean(dim=1).sqrt().clamp(min=1e-6)
    ratio = (query_rms / key_rms).sqrt()
    return (ratio / ratio.median(dim=-1, keepdim=True).values).clamp(0.01, 100.0)


@dataclass(frozen=True)
class Softmax:
    """Attention probabilities `softmax(q K^T * scaling)`, with softcap, sinks and window."""

    scaling: float
    softcap: float | None  # c: scores become c * tanh(score / c)
    sinks: Tensor | None  # [Hkv, G] one logit per query head that takes probability and has no value
    window: int | None  # W: position p attends to p-W+1..p; None attends to all

    def probabilities(self, queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """Return probabilities `[Hkv, G, q, n]` of queries at `positions [q]`.

        Queries `[Hkv, G, q, D]`, keys `[Hkv, n, D]`.
        """
        distance = positions[:, None] - torch.arange(keys.shape[1], device=keys.device)  # [q, n]
        visible = (distance >= 0) & (distance < (keys.shape[1] if self.window is None else self.window))
        scores = queries @ keys.unsqueeze(1).transpose(-1, -2) * self.scaling  # [Hkv, G, q, n]
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks[..., None, None].expand_as(scores[..., :1])], dim=-1)  # [.., n + 1]
        return scores.softmax(dim=-1)[..., : keys.shape[1]]  # [Hkv, G, q, n]


def attend(probabilities: Tensor, values: Tensor) -> Tensor:
    """Return `[Hkv, G, q, D]` of probabilities `[Hkv, G, q, n]` and values `[Hkv, n, D]`."""
    return probabilities @ values.unsqueeze(1)


def select(probabilities: Tensor, candidates: int, top_k: TopK) -> Tensor:
    """Select per KV head the `k` most attended positions of `[0, candidates)` (Algorithms 2, 3).

    `probabilities [Hkv, G, 1, n]` are those of the selecting token over all it attends to. They are
    averaged over the `G` query heads; ties go to the lower position. Returns int64
    `[Hkv, min(k, candidates)]`, ascending.
    """
    importance = probabilities.squeeze(2).mean(dim=1)[:, :candidates]  # [Hkv, candidates]
    ranking = importance.sort(dim=-1, descending=True, stable=True).indices  # stable: ties keep their order
    return ranking[:, : top_k.of(candidates)].sort(dim=-1).values


def swap_in(low_bit: Tensor, exact: Tensor, fetched: Tensor) -> Tensor:
    """Return `low_bit [Hkv, n, D]` with `exact [Hkv, n, D]` at `fetched [Hkv, k]` (Algorithm 3)."""
    index = fetched.unsqueeze(-1).expand(-1, -1, low_bit.shape[-1])  # [Hkv, k, D]
    return low_bit.scatter(1, index, exact.gather(1, index))


@dataclass
class Layer:
    """The cache of a layer: every pair in the model's dtype, and the low-bit ones decoded."""

    config: SpeCacheConfig  # resolved: its policy is never `auto`
    exact: bool  # True quantises nothing: a sliding-window layer, or policy `full`
    keys: Tensor  # [Hkv, n, D] model dtype, after RoPE; built with n = 0
    values: Tensor  # [Hkv, n, D] model dtype

    def __post_init__(self) -> None:
        self.low_bit_keys = self.keys.float()  # [Hkv, L(n), D]
        self.low_bit_values = self.values.float()  # [Hkv, L(n), D]
        self.fetched_positions = self.keys.new_empty(self.keys.shape[:2], dtype=torch.int64)  # [Hkv, <=k]
        self.queries: Tensor | None = None  # [Hkv, G, <=R+g, D] of the first tokens
        self.weights: Tensor | None = None  # [Hkv, D] once the first group is quantised

    @property
    def low_bit_length(self) -> int:
        """Return `L(n) = g * max(0, (n - R) // g)`; 0 if nothing is quantised."""
        return 0 if self.exact else self.config.low_bit_length(self.keys.shape[1])

    def append(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Commit pairs `[Hkv, q, D]`, and quantise the groups that leave the residual, once."""
        prefix = self.config.residual + self.config.group_size
        all_queries = queries if self.queries is None else torch.cat([self.queries, queries], dim=2)
        self.queries = all_queries[:, :, :prefix]
        self.keys = torch.cat([self.keys, keys], dim=1)  # [Hkv, n + q, D]
        self.values = torch.cat([self.values, values], dim=1)
        leaving = slice(self.low_bit_keys.shape[1], self.low_bit_length)
        new_keys, new_values = self._low_bit(self.keys[:, leaving], self.values[:, leaving], prefix)
        self.low_bit_keys = torch.cat([self.low_bit_keys, new_keys], dim=1)  # [Hkv, L(n + q), D]
        self.low_bit_values = torch.cat([self.low_bit_values, new_values], dim=1)

    def _low_bit(self, keys: Tensor, values: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """Quantise and decode whole groups `[Hkv, n, D]`, float32."""
        bits, g = self.config.bits, self.config.group_size
        if self.config.code is Code.KIVI or not keys.shape[1]:
            new_keys = dequantise_keys(*quantise_keys(keys, bits, g), g)
            return new_keys, dequantise_values(*quantise_values(values, bits, g), g)
        if self.weights is None:
            assert self.queries is not None
            self.weights = key_weights(self.queries, self.keys[:, :prefix])
        return rotated_low_bit_kv(keys, values, self.weights, bits, g)

    def prefill(self, softmax: Softmax, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend causally over the prompt, then quantise it (Algorithm 1) -> `[Hkv, G, S, D]`."""
        positions = torch.arange(keys.shape[1], device=keys.device)  # [S]
        out = attend(softmax.probabilities(queries, keys.float(), positions), values.float())
        self.append(queries, keys, values)
        if self.config.policy.selects_in_prefill:  # no pre-decoding: the last prompt token selects
            low_bit = torch.cat([self.low_bit_keys, keys[:, self.low_bit_length :].float()], dim=1)  # [Hkv, S, D]
            probabilities = softmax.probabilities(queries[:, :, -1:], low_bit, positions[-1:])  # [Hkv, G, 1, S]
            self.fetched_positions = select(probabilities, self.low_bit_length, self.config.selection)
        return out

    def decode(self, softmax: Softmax, queries: Tensor, keys: Tensor, values: Tensor, committed: int) -> Tensor:
        """Attend over low-bit and fetched pairs, residual and new tokens (Algorithms 2 and 3).

        Queries `[Hkv, G, q, D]`, keys and values `[Hkv, q, D]`. New token `i` attends to the new
        tokens `0..i`; the first `committed` ones are kept. Returns `[Hkv, G, q, D]` float32.
        """
        length, low_bit_length, config = self.keys.shape[1], self.low_bit_length, self.config
        exact_keys = torch.cat([self.keys, keys], dim=1).float()  # [Hkv, n + q, D]
        exact_values = torch.cat([self.values, values], dim=1).float()
        low_bit_keys = torch.cat([self.low_bit_keys, exact_keys[:, low_bit_length:]], dim=1)  # [Hkv, n + q, D]
        low_bit_values = torch.cat([self.low_bit_values, exact_values[:, low_bit_length:]], dim=1)
        outputs, fetched = [], self.fetched_positions
        for row in range(queries.shape[2]):
            query = queries[:, :, row : row + 1]  # [Hkv, G, 1, D]
            position = torch.tensor([length + row], device=keys.device)  # [1]
            if config.policy.verifies:  # the token's own selection, from low-bit scores
                fetched = select(softmax.probabilities(query, low_bit_keys, position), low_bit_length, config.selection)
            mixed_keys = swap_in(low_bit_keys, exact_keys, fetched)
            mixed_values = swap_in(low_bit_values, exact_values, fetched)
            probabilities = softmax.probabilities(query, mixed_keys, position)  # [Hkv, G, 1, n + q]
            outputs.append(attend(probabilities, mixed_values))
        self.append(queries[:, :, :committed], keys[:, :committed], values[:, :committed])
        if config.policy.prefetches and not config.policy.verifies:  # the last token selects for the next pass
            self.fetched_positions = select(probabilities, self.low_bit_length, config.selection)
        return torch.cat(outputs, dim=2)


@dataclass
class ReferenceState:
    """The state of one sequence, and of the running pass."""

    config: SpeCacheConfig
    positions: int | None = None  # the model's maximum; a window of that length is full attention
    length: int = 0  # n
    committed: int = 0  # tokens of this pass whose keys and values are kept
    layers: dict[int, Layer] = field(default_factory=dict)

    def forward(self, model: Any, token_ids: Sequence[int], committed: int) -> Tensor:
        """Run one pass over `token_ids` at positions `n, n+1, ..`; keep the first `committed` ones.

        Returns raw float32 logits `[q, V]`; of a prefill the last token's `[1, V]`.
        """
        self.committed = committed
        ids = torch.tensor([token_ids], device=model.device)  # [1, q]
        position_ids = torch.arange(self.length, self.length + len(token_ids), device=model.device)[None]  # [1, q]
        extra = {NAME: self, "use_cache": False, "logits_to_keep": 0 if self.layers else 1}  # 0 keeps all
        logits: Tensor = model(ids, position_ids=position_ids, **extra).logits[0]  # [q, V]
        if not self.layers:
            raise UnsupportedModelError(f"{type(model).__name__} does not call registered attention functions.")
        self.length += committed
        return logits.float()


def attention_function(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute the attention of one module.

    `query [1, Hq, q, D]`, new `key`, `value [1, Hkv, q, D]`. Returns `[1, q, Hq, D]`.
    """
    state: ReferenceState = kwargs[NAME]
    keys, values = key[0], value[0]  # [Hkv, q, D]
    queries = query[0].float().unflatten(0, (keys.shape[0], -1))  # [Hkv, G, q, D]
    if (sinks := kwargs.get("s_aux", getattr(module, "sinks", None))) is not None:  # [Hq]
        sinks = sinks.float().unflatten(0, (keys.shape[0], -1))  # [Hkv, G]
    if (window := kwargs.get("sliding_window")) is not None and window >= (state.positions or inf):
        window = None  # full attention
    softmax = Softmax(scaling, kwargs.get("softcap"), sinks, window)
    if module.layer_idx in state.layers:
        out = state.layers[module.layer_idx].decode(softmax, queries, keys, values, state.committed)
    else:
        exact = window is not None or state.config.policy is Policy.FULL
        layer = state.layers[module.layer_idx] = Layer(state.config, exact, keys[:, :0], values[:, :0])
        out = layer.prefill(softmax, queries, keys, values)
    return out.flatten(0, 1).transpose(0, 1).unsqueeze(0).to(query.dtype), None  # [Hkv, G, q, D] -> [1, q, Hq, D]


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # `Softmax` masks by position


@dataclass
class ReferenceOutput:
    """The result of `generate`: each new token with its logits and draft; every layer's cache."""

    tokens: list[int]
    logits: Tensor  # [new, V] float32, raw; the first from the prefill
    drafts: list[int | None]  # None for the first token, and for policies without draft tokens
    layers: dict[int, Layer]  # after the last step


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    config: SpeCacheConfig,
    max_new_tokens: int,
    *,
    forced_tokens: Sequence[int] | None = None,
    forced_drafts: Sequence[int | None] | None = None,
) -> ReferenceOutput:
    """Generate exactly `max_new_tokens` tokens greedily (no stop at EOS) from `input_ids [1, S]`.

    `forced_tokens[i]` replaces the most likely token `i`. `forced_drafts[i]` replaces the draft
    token for token `i` unless it is None; entry 0 is ignored, as the first token has no draft.
    Raises `UsageError` on a batch, an empty prompt, `max_new_tokens < 1`, or too few forced
    entries.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1 or max_new_tokens < 1:
        raise UsageError(f"Expected input_ids [1, S] and a token to generate, got {input_ids.shape}, {max_new_tokens}.")
    if any(forced is not None and len(forced) < max_new_tokens for forced in (forced_tokens, forced_drafts)):
        raise UsageError(f"forced_tokens and forced_drafts need {max_new_tokens} entries, one per new token.")
    state = ReferenceState(config.resolved(model.device.type), max_positions(model))
    own_attention = model.config._attn_implementation
    tokens, drafts, logits = list[int](), list[int | None](), list[Tensor]()

    def emit(row: Tensor, draft: int | None) -> None:
        tokens.append(int(row.argmax()) if forced_tokens is None else forced_tokens[len(tokens)])
        drafts.append(draft)
        logits.append(row)  # [V]

    try:
        model.set_attn_implementation(NAME)
        rows = state.forward(model, input_ids[0].tolist(), committed=input_ids.shape[1])  # Algorithm 1: prefill
        emit(rows[-1], None)
        if state.config.policy.drafts and max_new_tokens > 1:
            rows = state.forward(model, tokens, committed=0)  # Algorithm 2: pre-decode T1, to be fed again
        for step in range(1, max_new_tokens):  # Algorithm 3: decode T_t, and the draft of T_{t+1} if there is one
            draft = None
            if state.config.policy.drafts:
                forced = forced_drafts[step] if forced_drafts is not None else None
                draft = int(rows[-1].argmax()) if forced is None else forced
            rows = state.forward(model, [tokens[-1]] if draft is None else [tokens[-1], draft], committed=1)
            emit(rows[0], draft)
    finally:
        model.set_attn_implementation(own_attention)
    return ReferenceOutput(tokens, torch.stack(logits), drafts, state.layers)
