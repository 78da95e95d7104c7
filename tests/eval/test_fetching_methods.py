"""YAKV and Quest against the stock model under a mask over the keys that they choose."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from specache import reference
from specache.cache.sizes import compressed_bytes, low_bit_pages
from specache.config import Code, Policy, SpeCacheConfig
from specache.eval.methods.key_copy import KeyCopy
from specache.eval.methods.offloaded_rows import FetchedRows, OffloadedRows
from specache.eval.methods.quest import QuestMethod
from specache.eval.methods.snapkv import SnapKVMethod
from specache.eval.methods.yakv import YAKVMethod
from specache.eval.methods_option import NamedMethod, parse_methods
from specache.eval.prefilled import Prefilled
from specache.kernels.types import AttentionParams
from specache.low_bit.layout import PageLayout
from tests.engine.test_model_families import FAMILIES, build
from tests.eval.test_methods import fed, started, stock_logits
from tests.tiny import llama, prompt

LENGTH = 150
NEW = 20
FAMILIES_TRIED = ("llama", "llama-multi-head", "gemma2", "gemma3", "gpt-oss")
NAME = "attention_under_a_mask"

Chosen = Callable[["MaskedModel", int, Tensor], Tensor]  # (model, layer, queries [Hkv, G, D]) -> keys seen, bool [Hkv, T]


class MaskedModel:
    """A stock model whose attention is an einsum over all keys, with a mask per KV head.

    The mask is causal, with the sliding window of layers that have one. In decode steps of
    full-attention layers it is what `chosen` returns.

    Attributes:
        queries: of the prompt, per layer [Hkv, G, S, D].
        keys, values: per layer [Hkv, T, D].
        params: scaling, softcap and sinks [Hkv, G, 1, 1] of each layer.
    """

    def __init__(self, family: str, ids: Tensor, chosen: Chosen) -> None:
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.params: dict[int, tuple[float, float | None, Tensor | None]] = {}
        self._chosen = chosen
        self._model = build(*FAMILIES[family])
        self._model.set_attn_implementation(NAME)
        self._length = 0
        self.run(ids[0].tolist())

    def run(self, tokens: list[int]) -> Tensor:
        """Return the logits [V] after the tokens."""
        positions = torch.arange(self._length, self._length + len(tokens))[None]
        self._length += len(tokens)
        with torch.no_grad():
            output = self._model(torch.tensor([tokens]), position_ids=positions, use_cache=False, masked_model=self)
        return output.logits[0, -1]

    def scores(self, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Return scores [Hkv, G, n, T] of queries [Hkv, G, n, D]."""
        scaling, softcap, _ = self.params[layer]
        scores = torch.einsum("hgnd,htd->hgnt", queries, keys) * scaling
        return scores if softcap is None else (scores / softcap).tanh() * softcap

    def probabilities(self, layer: int, scores: Tensor) -> Tensor:
        """Return the softmax over the last dimension, in which the sinks take their share."""
        sinks = self.params[layer][2]
        if sinks is None:
            return scores.softmax(-1)
        return torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1).softmax(-1)[..., :-1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        heads, n = key.shape[0], key.shape[1]
        queries = query.unflatten(0, (heads, -1))  # [Hkv, G, n, D]
        self.keys[layer] = torch.cat([self.keys[layer], key], dim=1) if layer in self.keys else key
        self.values[layer] = torch.cat([self.values[layer], value], dim=1) if layer in self.values else value
        length = self.keys[layer].shape[1]
        own, every = torch.arange(length - n, length)[:, None], torch.arange(length)
        seen = (every <= own) & (every > own - (window or length))  # [n, T]
        if layer not in self.queries:
            self.queries[layer] = queries
        elif window is None:
            seen = self._chosen(self, layer, queries[:, :, 0])[:, None, None]  # [Hkv, 1, 1, T]
        scores = self.scores(layer, queries, self.keys[layer]).masked_fill(~seen, -torch.inf)
        return torch.einsum("hgnt,htd->hgnd", self.probabilities(layer, scores), self.values[layer]).flatten(0, 1)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
    masked: MaskedModel = kwargs["masked_model"]
    sinks = kwargs.get("s_aux", getattr(module, "sinks", None))
    sinks = None if sinks is None else sinks.float().reshape(key.shape[1], -1, 1, 1)
    masked.params[module.layer_idx] = scaling, kwargs.get("softcap"), sinks
    out = masked.attend(module.layer_idx, query[0], key[0], value[0], kwargs.get("sliding_window"))
    return out.transpose(0, 1)[None], None  # [1, n, Hq, D]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def joined(scores: Tensor, reduction: str) -> Tensor:
    """Join the query heads of scores [Hkv, G, x] -> [Hkv, x]."""
    return scores.mean(1) if reduction == "mean" else scores.max(1).values


def assert_largest(chosen: Tensor, scores: Tensor, count: int) -> None:
    """Check that `chosen` [Hkv, count] are the largest of scores [Hkv, x], up to rounding."""
    assert [len(set(row)) for row in chosen.tolist()] == [min(count, scores.shape[1])] * len(scores)
    least = scores.topk(chosen.shape[1], dim=1).values[:, -1:]
    assert (scores.gather(1, chosen.long()) >= least - 1e-4 * scores.abs().amax(1, keepdim=True)).all()


def low_bit_keys(method: YAKVMethod, masked: MaskedModel, layer: int, prompt_keys: Tensor, count: int) -> Tensor:
    """Return the first `count` keys as the oracle quantises and decodes them, [Hkv, count, D].

    The prompt's keys are those that the session quantised: rounding may not flip a code.
    """
    keys = torch.cat([prompt_keys, masked.keys[layer][:, LENGTH:]], dim=1)[:, :count]
    if method.code is Code.KIVI:
        return reference.dequantise_keys(*reference.quantise_keys(keys, method.bits, method.group_size), method.group_size)
    weights = reference.key_weights(masked.queries[layer][:, :, -64:], prompt_keys)
    return reference.rotated_low_bit_kv(keys, keys, weights, method.bits, method.group_size)[0]


def rows(methods: list[Any]) -> list[Any]:
    """Return (method, family): the first method in every family, the others in two."""
    families = [FAMILIES_TRIED] + [("llama", "gpt-oss")] * (len(methods) - 1)
    return [
        pytest.param(method, family, id=f"{number}-{family}")
        for number, (method, tried) in enumerate(zip(methods, families, strict=True))
        for family in tried
    ]


YAKV = [
    YAKVMethod(budget=0.4, recent=4, group_size=16),
    YAKVMethod(top_k=10, recent=9, group_size=8, code=Code.KIVI, reduction="max"),
    YAKVMethod(top_k=20, recent=0, group_size=32, bits=1),
]


@pytest.mark.parametrize(("method", "family"), rows(YAKV))
def test_yakv_equals_the_model_under_a_mask_over_the_keys_that_the_low_bit_keys_choose(method, family):
    ids, tokens = prompt(LENGTH), prompt(NEW, seed=1)[0].tolist()
    with started(build(*FAMILIES[family]), ids, method) as (session, start):

        def chosen(masked: MaskedModel, layer: int, queries: Tensor) -> Tensor:
            length = masked.keys[layer].shape[1]
            older = max(0, (length - 1 - method.recent) // method.group_size) * method.group_size
            copy = low_bit_keys(method, masked, layer, start.rows(layer)[0], older)
            scores = masked.scores(layer, queries.unsqueeze(2), torch.cat([copy, masked.keys[layer][:, older:]], dim=1))
            probabilities = masked.probabilities(layer, scores)[:, :, 0, :older]  # [Hkv, G, older]
            positions = session.layers[layer].fetched.units
            assert_largest(positions, joined(probabilities, method.reduction), method.top_k or positions.shape[1])
            seen = torch.zeros(len(positions), length, dtype=torch.bool)
            seen[:, older:] = True
            return seen.scatter(1, positions.long(), True)

        masked = MaskedModel(family, ids, chosen)
        for token in tokens:
            logits = session.feed(token)
            assert (logits - masked.run([token])).abs().max() < 1e-4
        stats = session.stats()
    assert 0 < stats.hit_rate < 1
    assert (logits - stock_logits(build(*FAMILIES[family]), ids, tokens)[-1]).abs().max() > 1e-3


QUEST = [
    QuestMethod(budget=0.3, page_size=8, full_layers=0),
    QuestMethod(token_budget=48, full_layers=1, reduction="mean"),
    QuestMethod(token_budget=30, page_size=5, full_layers=2),
]


@pytest.mark.parametrize(("method", "family"), rows(QUEST))
def test_quest_equals_the_model_under_a_mask_over_the_pages_with_the_largest_bounds(method, family):
    ids, tokens, size = prompt(LENGTH), prompt(NEW, seed=1)[0].tolist(), method.page_size
    sparse: set[int] = set()
    with started(build(*FAMILIES[family]), ids, method) as (session, _):

        def chosen(masked: MaskedModel, layer: int, queries: Tensor) -> Tensor:
            heads, length, _ = masked.keys[layer].shape
            if layer < method.full_layers:
                return torch.ones(heads, length, dtype=torch.bool)
            sparse.add(layer)
            full = (length - 1) // size  # pages
            pages = masked.keys[layer][:, : full * size].unflatten(1, (full, size))
            low, high = (torch.einsum("hgd,hpd->hgpd", queries, side) for side in (pages.amin(2), pages.amax(2)))
            bounds = joined(torch.maximum(low, high).sum(-1), method.reduction)
            held = session.layers[layer].fetched.units.long()
            assert_largest(held, bounds, method.token_budget // size - 1 if method.token_budget else held.shape[1])
            seen = torch.zeros(heads, length, dtype=torch.bool)
            seen[:, full * size :] = True
            return seen.scatter(1, (held[:, :, None] * size + torch.arange(size)).flatten(1), True)

        masked = MaskedModel(family, ids, chosen)
        for token in tokens:
            logits = session.feed(token)
            assert (logits - masked.run([token])).abs().max() < 1e-4
        stats = session.stats()
        layers = set(session.layers)
    assert sparse == {layer for layer in layers if layer >= method.full_layers}
    if sparse:
        assert 0 < stats.hit_rate < 1
        assert (logits - stock_logits(build(*FAMILIES[family]), ids, tokens)[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("length", [3, 40, 70])
@pytest.mark.parametrize("method", [YAKVMethod(), QuestMethod(token_budget=80)], ids=lambda method: method.name)
def test_a_prompt_shorter_than_the_budget_is_attended_to_whole(method, length):
    model, ids, tokens = llama(), prompt(length), prompt(9, seed=1)[0].tolist()
    with started(model, ids, method) as (session, _):
        assert (fed(session, tokens) - stock_logits(model, ids, tokens)).abs().max() < 1e-4


def held_rows(method: Any, length: int) -> tuple[Any, float, float]:
    """Return the first layer after a prompt, and its fast and hot bytes in rows per KV head."""
    start = Prefilled(llama(num_hidden_layers=1), prompt(length)[0].tolist())
    layer = method.layer(start, 0)
    return layer, layer.nbytes / (2 * 64), layer.hot_nbytes / (2 * 64)  # 2 KV heads, rows of 2 x 16 elements


@pytest.mark.parametrize("budget", [0.25, 0.4])
def test_yakv_counts_low_bit_keys_the_newest_tokens_and_the_fetched_rows(budget):
    length = 1000
    layer, fast, hot = held_rows(YAKVMethod(budget=budget, code=Code.KIVI, recent=32), length)
    older = 960  # 15 pages
    copy = older * 2 * 16 * (2 / 8) + older / 64 * 2 * 16 * 4  # codes; two float16 per channel and group
    assert layer.nbytes == copy + (32 + 64) * 2 * 64  # bytes of a row of both heads: 2 x 64
    assert layer.hot_nbytes == layer.fetched.slots * 2 * (64 + 4)  # and a position beside each row
    assert budget * length - 2 < fast + hot <= budget * length


@pytest.mark.parametrize("budget", [0.25, 0.4])
def test_quest_counts_the_bounds_the_newest_page_and_the_fetched_pages(budget):
    length = 1000
    layer, fast, hot = held_rows(QuestMethod(budget=budget, full_layers=0), length)
    assert fast == 62 + 16  # a minimum and a maximum per page are as large as a row
    assert hot == layer.fetched.slots * (16 + 4 / 64)
    assert budget * length - 17 < fast + hot <= budget * length


def test_quest_takes_the_full_layers_from_the_budget():
    start = Prefilled(llama(num_hidden_layers=10), prompt(400)[0].tolist())
    method = QuestMethod(budget=0.5)
    layers = [method.layer(start, index) for index in range(10)]
    assert [layer.nbytes + layer.hot_nbytes == 400 * 128 for layer in layers] == [True] * 2 + [False] * 8
    held = sum(layer.nbytes + layer.hot_nbytes for layer in layers) / (10 * 400 * 128)
    assert 0.5 - 17 / 400 < held <= 0.5


def share_of_cache(named: NamedMethod, length: int, new: int) -> float:
    """Return fast and hot bytes over the ordinary cache, with SmolLM2's 30 layers of 3 x 64."""
    method: Any = named.method
    heads, dim, layers = 3, 64, 30
    row = heads * dim * 2 * 2
    if named.name in ("specache", "kivi"):
        config = method.config if named.name == "specache" else SpeCacheConfig(policy=Policy.NONE, **method.settings())
        pages = low_bit_pages(config, length + new)
        fast = compressed_bytes(config, heads, dim, 2, pages=pages, observed=0, slots=0, pairs=0)
        hot = config.hot_set * length * row if config.policy is not Policy.NONE else 0
        return (fast.low_bit + fast.residual + fast.key_weights + hot) / ((length + new) * row)
    keys = torch.randn(heads, length, dim)
    prompt = SimpleNamespace(
        length=length,
        full_layers=list(range(layers)),
        params={layer: AttentionParams(0.125) for layer in range(layers)},
        rows=lambda layer: (keys, keys),
        queries=lambda layer: torch.ones(3 * heads, 64, dim),
        cache=SimpleNamespace(info=SimpleNamespace(device=keys.device)),
    )
    first, last = (method.layer(prompt, layer) for layer in (0, layers - 1))
    full = getattr(method, "full_layers", 0)
    held = full * (first.nbytes + first.hot_nbytes) + (layers - full) * (last.nbytes + last.hot_nbytes)
    if isinstance(method, SnapKVMethod):
        return (held + new * layers * row) / ((length + new) * layers * row)
    return held / (length * layers * row)


def test_the_methods_that_the_documentation_compares_hold_a_quarter_of_the_cache():
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    line = re.search(r"^--methods (\S+)$", page, re.MULTILINE)
    assert line is not None
    methods = parse_methods(line[1])
    assert len(methods) == 7
    for named in methods:
        assert share_of_cache(named, 8000, 128) == pytest.approx(0.25, abs=0.01), named.label
    shorter = parse_methods(",".join(re.findall(r"`((?:snapkv|kivi):\S+)`", page)))
    assert len(shorter) == 2
    for named in shorter:
        assert share_of_cache(named, 4000, 32) == pytest.approx(0.25, abs=0.01), named.label


@pytest.mark.parametrize("method", [YAKVMethod(recent=4, group_size=16), QuestMethod(page_size=8)], ids=lambda method: method.name)
def test_a_closed_session_frees_its_layers(method):
    with started(llama(), prompt(LENGTH), method) as (session, _):
        fed(session, prompt(20, seed=1)[0].tolist())
        layers = [weakref.ref(layer) for layer in session.layers.values()]
        fetched = weakref.ref(session.layers[2].fetched)
        session.close()
        assert not session.layers
        assert fetched() is None and all(layer() is None for layer in layers)


@pytest.mark.parametrize("size", [1, 4])
def test_fetched_rows_are_the_offloaded_ones_and_only_missing_ones_are_read(size):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 40 * size, 8, generator=generator)
    slow = OffloadedRows(keys[:, : 24 * size], values[:, : 24 * size], size)
    slow.append(keys[:, 24 * size : 32 * size], values[:, 24 * size : 32 * size])
    slow.append(keys[:, 32 * size :], values[:, 32 * size :])
    assert slow.count == 40
    read: list[int] = []

    class Counted(OffloadedRows):
        def read(self, heads: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
            read.append(len(units))
            return slow.read(heads, units)

    fetched = FetchedRows(Counted(keys[:, :size], values[:, :size], size), 12, like=keys)
    held = [set() for _ in range(3)]
    needed = hits = 0
    for count in (6, 12, 3, 9):
        units = torch.stack([torch.randperm(40, generator=generator)[:count].sort().values for _ in range(3)])
        got = fetched.take(units)
        here = sum(len(held[head] & set(units[head].tolist())) for head in range(3))
        needed, hits = needed + 3 * count, hits + here
        assert read.pop() == 3 * count - here
        for rows, taken in zip((keys, values), got, strict=True):
            expected = torch.stack([rows[head].unflatten(0, (40, size))[units[head]].flatten(0, 1) for head in range(3)])
            assert torch.equal(taken, expected)
        held = [set(row) for row in units.tolist()]
    assert (fetched.needed, fetched.hits) == (needed, hits) and hits > 0


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("group_size", [16, 64])
def test_low_bit_keys_appended_in_pieces_equal_those_appended_at_once(group_size, code):
    keys = torch.randn(2, 64 * 5, 24, generator=torch.Generator().manual_seed(0))
    config = SpeCacheConfig(code=code, group_size=group_size)
    scales = torch.rand(2, 24) + 0.5 if code is Code.ROTATED else None
    layout = PageLayout(config.code, config.bits, config.group_size, 2, 24)
    at_once, pieces = (KeyCopy(layout, keys.device, scales) for _ in range(2))
    at_once.append(keys)
    for first, stop in [(0, 64), (64, 64 * 3), (64 * 3, 64 * 3 + group_size), (64 * 3 + group_size, 64 * 5)]:
        pieces.append(keys[:, first:stop])
    query = torch.randn(4, 1, 24)
    params = AttentionParams(scaling=0.3)
    assert torch.equal(at_once.scores(query, params), pieces.scores(query, params))
    assert at_once.nbytes == pieces.nbytes
    decoded = (
        reference.dequantise_keys(*reference.quantise_keys(keys, 2, group_size), group_size)
        if scales is None
        else reference.rotated_low_bit_kv(keys, keys, scales, 2, group_size)[0]
    )
    expected = 0.3 * torch.einsum("hgd,htd->hgt", query[:, 0].unflatten(0, (2, 2)), decoded)
    assert (pieces.scores(query, params) - expected).abs().max() < 1e-3
    capped = pieces.scores(query, AttentionParams(scaling=0.3, softcap=2.0))
    assert (capped - 2 * (expected / 2).tanh()).abs().max() < 1e-3
