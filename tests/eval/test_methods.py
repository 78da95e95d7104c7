"""Every method of the suite in one test matrix, then the particular behaviour of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import specache
from specache.engine.attention_hook import attached
from specache.errors import ConfigError, MethodUnavailableError
from specache.eval import prefilled
from specache.eval.catalogue import METHODS, method_class
from specache.eval.methods.dense_cache import DenseMethod, DenseSession
from specache.eval.methods.h2o import H2OMethod, accumulated_attention
from specache.eval.methods.infllm import InfLLMMethod, representative_scores
from specache.eval.methods.offloaded_cache import OffloadedMethod
from specache.eval.methods.quantized import QuantizedMethod, quantized_bytes
from specache.eval.methods.quest import QuestMethod
from specache.eval.methods.snapkv import SnapKVMethod
from specache.eval.methods.stock import tensor_bytes
from specache.eval.methods.streaming_llm import StreamingLLMMethod
from specache.eval.methods.yakv import YAKVMethod
from specache.eval.prefilled import Prefilled
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import llama, prompt

LENGTH = 200
NEW = 20
CHUNK = 48
MODELS = ("llama", "gemma2", "gemma3", "gpt-oss", "llama-dynamic-rope")
SMALL_BLOCKS = {"block_size": 8, "representatives": 2}

QUARTER = {
    "streaming-llm": StreamingLLMMethod(),
    "h2o": H2OMethod(),
    "snapkv": SnapKVMethod(),
    "infllm": InfLLMMethod(**SMALL_BLOCKS),
    "quest": QuestMethod(page_size=8, full_layers=0),
    "yakv": YAKVMethod(recent=4, group_size=16),
}
ADDED = {"snapkv": NEW, "yakv": 8}  # rows that decoded tokens add to the budget: themselves, or a page of their low-bit keys
FETCHES = ("infllm", "quest", "yakv")
EVERYTHING = {name: replace(method, budget=2) for name, method in QUARTER.items()}
EVERYTHING["infllm, all of it retrieved"] = InfLLMMethod(budget=2, local_share=0.2, **SMALL_BLOCKS)


@contextmanager
def started(model: Any, ids: Tensor, method: Any) -> Iterator[tuple[Any, Prefilled]]:
    """Yield a session of the method after ids [1, S], and the prompt that it started from."""
    start = Prefilled(model, ids[0].tolist(), all_queries=method.needs_all_queries)
    with torch.no_grad(), attached(model):
        session = method.start(start)
        yield session, start
        session.close()
        session.close()
    start.close()


def fed(session: Any, tokens: list[int]) -> Tensor:
    """Return logits [n, V] after each token."""
    return torch.stack([session.feed(token) for token in tokens])


def stock_logits(model: Any, ids: Tensor, tokens: list[int]) -> Tensor:
    """Return the same logits from the model with its own cache, token by token."""
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        return torch.cat([model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in tokens])


def layer_of(session: DenseSession, index: int = 0) -> Any:
    return session.layers[index]


@pytest.fixture(autouse=True)
def _chunked_prefill(monkeypatch):
    """Prefill every prompt in several chunks, as long ones are."""
    original = prefilled.SpeCacheConfig
    monkeypatch.setattr(prefilled, "SpeCacheConfig", lambda **settings: original(prefill_chunk=CHUNK, **settings))


def test_the_matrix_has_every_registered_method():
    needs_more = {"full", "specache", "kivi", "quantized", "offloaded"}
    assert set(QUARTER) == set(METHODS) - needs_more
    for name, method in QUARTER.items():
        assert method_class(name) is type(method)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_name_summary_and_settings(name):
    cls = method_class(name)
    assert cls.name == name
    assert cls.summary and "\n" not in cls.summary
    assert isinstance(cls().settings(), dict)
    assert isinstance(cls.needs_all_queries, bool)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_method_with_a_full_budget_equals_the_stock_cache(name, family):
    model, ids, tokens = build(*FAMILIES[family]), prompt(LENGTH), prompt(NEW, seed=1)[0].tolist()
    with started(model, ids, EVERYTHING[name]) as (session, _):
        logits = fed(session, tokens)
    assert (logits - stock_logits(model, ids, tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", QUARTER)
def test_a_method_at_a_quarter_of_the_memory_stays_in_its_budget(name, family):
    model, ids, tokens = build(*FAMILIES[family]), prompt(LENGTH), prompt(NEW, seed=1)[0].tolist()
    method = QUARTER[name]
    with started(model, ids, method) as (session, _):
        at_start = session.stats()
        logits = fed(session, tokens)
        stats = session.stats()
    assert 0.2 < at_start.fast_ratio + at_start.hot_ratio <= method.budget
    rows = method.budget * LENGTH + ADDED.get(name, 0)
    assert stats.fast_ratio + stats.hot_ratio <= rows / (LENGTH + NEW) + 2 / LENGTH
    assert stats.guess_rate is None
    assert (stats.hit_rate is not None) == (name in FETCHES)
    assert logits.isfinite().all()
    assert (logits - stock_logits(model, ids, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("name", QUARTER)
@pytest.mark.parametrize("length", [1, 3, 9, 33])
def test_prompts_of_a_few_tokens_give_finite_logits(name, length):
    model, ids, tokens = llama(), prompt(length), prompt(NEW, seed=1)[0].tolist()
    with started(model, ids, QUARTER[name]) as (session, _):
        assert fed(session, tokens).isfinite().all()


@pytest.mark.parametrize("name", QUARTER)
def test_sessions_of_one_prompt_do_not_disturb_each_other_or_the_prompt(name):
    model, ids, tokens = build(*FAMILIES["gemma3"]), prompt(LENGTH), prompt(NEW, seed=1)[0].tolist()
    method = QUARTER[name]
    with started(model, ids, method) as (session, start):
        rows = [start.rows(index)[0].clone() for index in start.full_layers]
        other = method.start(start)
        first = fed(session, tokens)
        assert torch.equal(fed(other, tokens), first)
        assert all(torch.equal(start.rows(index)[0], kept) for index, kept in zip(start.full_layers, rows, strict=True))


@pytest.mark.parametrize("name", QUARTER)
def test_a_prompt_prefilled_from_a_shared_prefix_gives_the_same_logits(name):
    model, ids, tokens = build(*FAMILIES["gpt-oss"]), prompt(LENGTH), prompt(NEW, seed=1)[0].tolist()
    method = QUARTER[name]
    with started(model, ids, method) as (session, _):
        expected = fed(session, tokens)
    shared = Prefilled(model, ids[0, :130].tolist(), all_queries=method.needs_all_queries)
    start = Prefilled(model, ids[0].tolist(), all_queries=method.needs_all_queries, like=shared)
    with torch.no_grad(), attached(model):
        assert (fed(method.start(start), tokens) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_streaming_llm_sees_the_first_and_the_newest_tokens_alone(family):
    """With one layer, only kept tokens can reach the logits. The stock model over the kept tokens,
    at their positions, must therefore agree.
    """
    changes = {"num_hidden_layers": 1, "layer_types": ["full_attention"]} if family == "gpt-oss" else {"num_hidden_layers": 1}
    kind, settings = FAMILIES[family]
    model = build(kind, {**settings, **changes})
    ids, tokens = prompt(LENGTH), prompt(NEW, seed=1)[0].tolist()
    with started(model, ids, StreamingLLMMethod(budget=0.2)) as (session, _):
        logits = fed(session, tokens)
    everything = torch.cat([ids[0], torch.tensor(tokens)])
    for step in (0, 7, NEW - 1):
        stop = LENGTH + step + 1
        kept = torch.cat([torch.arange(4), torch.arange(stop - 36, stop)])  # 40 rows: 4 sinks and the newest
        with torch.no_grad():
            expected = model(everything[kept][None], position_ids=kept[None]).logits[0, -1]
        assert (logits[step] - expected).abs().max() < 1e-4


def test_streaming_llm_forgets_the_middle():
    model, ids, tokens = llama(), prompt(LENGTH), prompt(NEW, seed=1)[0].tolist()
    changed = ids.clone()
    changed[0, 50:60] = prompt(10, seed=9)
    method = StreamingLLMMethod(budget=0.1)
    one_layer = llama(num_hidden_layers=1)
    with started(one_layer, ids, method) as (session, _):
        before = fed(session, tokens)
    with started(one_layer, changed, method) as (session, _):
        assert (fed(session, tokens) - before).abs().max() < 1e-5
    assert (stock_logits(model, ids, tokens) - stock_logits(model, changed, tokens)).abs().max() > 1e-2


def heavy_rows(start: Prefilled, heavy: list[int], seed: int = 0) -> None:
    """Give every KV head keys at `heavy` that get the most attention from all queries."""
    generator = torch.Generator().manual_seed(seed)
    queries: dict[int, Tensor] = {}
    for index in start.full_layers:
        keys, _ = start.rows(index)
        direction = torch.nn.functional.normalize(torch.randn(keys.shape[2], generator=generator), dim=0)
        queries[index] = 0.1 * start.queries(index) + 4 * direction
        keys.mul_(0.1)
        keys[:, heavy] = 8 * direction
    start.queries = queries.__getitem__  # type: ignore[method-assign]


@pytest.mark.parametrize("method", [SnapKVMethod(budget=0.3), H2OMethod(budget=0.3)], ids=lambda method: method.name)
def test_planted_heavy_keys_are_kept(method):
    heavy = [20, 77, 101]
    start = Prefilled(llama(), prompt(LENGTH)[0].tolist(), all_queries=method.needs_all_queries)
    heavy_rows(start, heavy)
    for index in start.full_layers:
        layer = method.layer(start, index)
        for positions in layer.positions.tolist():
            assert set(heavy) <= set(positions)
            assert set(range(LENGTH - 26, LENGTH)) <= set(positions)  # the newest: half of H2O's 53 rows, SnapKV's window
            assert len(set(positions)) == len(positions)


def test_snapkv_keeps_the_neighbours_of_a_heavy_token():
    start = Prefilled(llama(), prompt(LENGTH)[0].tolist())
    heavy_rows(start, [20, 77, 101])
    for positions in SnapKVMethod(budget=0.3, kernel_size=5).layer(start, 0).positions.tolist():
        assert {18, 19, 20, 21, 22, 75, 79, 99, 103} <= set(positions)


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_snapkv_selects_by_the_windows_attention(family, pooling):
    model = build(*FAMILIES[family])
    model.set_attn_implementation("eager")
    ids = prompt(LENGTH)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions  # [1, Hq, S, S] each
    method = SnapKVMethod(pooling=pooling, kernel_size=5)
    start = Prefilled(model, ids[0].tolist())
    for index in start.full_layers:
        votes = attentions[index][0, :, -32:, : LENGTH - 32].unflatten(0, (2, -1)).mean(dim=(1, 2))  # [Hkv, S - 32]
        padded = torch.nn.functional.pad(votes, (2, 2)).unfold(1, 5, 1)
        pooled = padded.amax(-1) if pooling == "max" else padded.mean(-1)
        threshold = pooled.topk(50 - 32, dim=1).values[:, -1]
        chosen = method.layer(start, index).positions[:, : 50 - 32]
        assert (pooled.gather(1, chosen) >= threshold[:, None] - 1e-6).all()
        assert [len(set(row)) for row in chosen.tolist()] == [18, 18]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_h2o_accumulates_the_models_own_attention(family):
    model = build(*FAMILIES[family])
    model.set_attn_implementation("eager")
    ids = prompt(LENGTH)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    start = Prefilled(model, ids[0].tolist(), all_queries=True)
    for index in start.full_layers:
        expected = attentions[index][0].sum(1).unflatten(0, (2, -1)).mean(1)  # [Hkv, S]
        mass = accumulated_attention(start.queries(index), start.rows(index)[0], start.params[index])
        assert (mass - expected).abs().max() < 1e-4


def test_h2o_evicts_the_lightest_token_that_is_not_recent():
    model, tokens = llama(num_hidden_layers=1), prompt(NEW, seed=1)[0].tolist()
    with started(model, prompt(LENGTH), H2OMethod()) as (session, _):
        layer = layer_of(session)
        recent = layer.recent
        for step, token in enumerate(tokens):
            before, mass = layer.positions.clone(), layer.attention_sums.clone()
            session.feed(token)
            position = LENGTH + step
            for head in range(2):
                left = set(before[head].tolist()) - set(layer.positions[head].tolist())
                assert set(layer.positions[head].tolist()) - set(before[head].tolist()) == {position}
                old = before[head] <= position - recent
                assert left == {int(before[head][old][mass[head][old].argmin()])}
                assert set(range(position - recent + 1, position + 1)) <= set(layer.positions[head].tolist())


def test_infllm_retrieves_the_blocks_whose_representatives_answer_the_query():
    model, tokens = llama(num_hidden_layers=1), prompt(60, seed=1)[0].tolist()
    method = InfLLMMethod(budget=0.5, **SMALL_BLOCKS)
    with started(model, prompt(LENGTH), method) as (session, start):
        layer = layer_of(session)
        keys = [start.rows(0)[0][:, i : i + 8] for i in range(4, LENGTH - 7, 8)]
        at_start = len(layer.blocks)
        assert all(torch.equal(block[0], k) for block, k in zip(layer.blocks, keys, strict=False))
        seen: list[Tensor] = []
        decode = layer.decode

        def seeing(query: Tensor, keys: Tensor, values: Tensor, params: Any) -> Tensor:
            seen.append(query[:, 0].unflatten(0, (2, -1)).mean(1))  # [Hkv, D]
            return decode(query, keys, values, params)

        layer.decode = seeing
        for token in tokens:
            session.feed(token)
            count = min(layer.plan.slots, len(layer.blocks))
            relevance = (layer.summaries[:, : len(layer.blocks)] @ seen[-1].unsqueeze(-1))[..., 0]
            if layer.local.count > layer.plan.local:  # no block was added after the retrieval
                for head in range(2):
                    assert set(relevance[head].topk(count).indices.tolist()) == set(layer.buffer_ids[head].tolist())
            for head in range(2):
                for slot, block in enumerate(layer.buffer_ids[head].tolist()):
                    assert torch.equal(layer.buffer[0, head, slot], layer.blocks[block][0][head])
                    assert torch.equal(layer.buffer[1, head, slot], layer.blocks[block][1][head])
        assert len(layer.blocks) > at_start + 5
        assert 0 < session.stats().hit_rate < 1
        held = sum(block[0].shape[1] for block in layer.blocks) + layer.local.count + layer.sinks.count
        assert held == LENGTH + len(tokens)


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("length", [2000, 8000])
def test_infllm_uses_its_budget_at_long_contexts(length, budget):
    plan = InfLLMMethod(budget=budget).plan(length, dim=64)
    local = (plan.local + plan.block) * (1 + 4 / 256)  # a float32 score beside each row of 256 bytes
    spent = plan.sinks + local + plan.slots * plan.block + length / plan.block / 2
    assert budget * length - 3 <= spent <= budget * length
    assert 0.3 < local / (spent - plan.sinks) < 0.7


def test_infllm_scores_a_token_by_the_queries_that_follow_it():
    query, keys = torch.randn(4, 30, 8), torch.randn(2, 30, 8)
    scores = representative_scores(query, keys, span=6)
    for head, token in [(0, 0), (1, 11), (0, 26), (1, 29)]:
        following = query[2 * head : 2 * head + 2, token + 1 : token + 7].mean(0)
        assert scores[head, token] == pytest.approx(float((following @ keys[head, token]).sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (StreamingLLMMethod, {"budget": 0}),
        (StreamingLLMMethod, {"sinks": -1}),
        (H2OMethod, {"recent_share": 1.5}),
        (SnapKVMethod, {"window": 65}),
        (SnapKVMethod, {"kernel_size": 4}),
        (SnapKVMethod, {"pooling": "median"}),
        (InfLLMMethod, {"local_share": 1.0}),
        (InfLLMMethod, {"representatives": 65}),
        (QuestMethod, {"page_size": 0}),
        (QuestMethod, {"token_budget": 31}),
        (QuestMethod, {"full_layers": -1}),
        (QuestMethod, {"reduction": "sum"}),
        (YAKVMethod, {"top_k": 0}),
        (YAKVMethod, {"recent": -1}),
        (YAKVMethod, {"bits": 3}),
        (YAKVMethod, {"code": "int2"}),
        (YAKVMethod, {"group_size": 48}),
        (YAKVMethod, {"reduction": "sum"}),
        (QuantizedMethod, {"backend": "int8"}),
        (QuantizedMethod, {"backend": "quanto", "bits": 3}),
        (QuantizedMethod, {"backend": "hqq", "bits": 3}),
        (QuantizedMethod, {"residual_length": 0}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(cls, settings):
    with pytest.raises(ConfigError, match=next(iter(settings)) if len(settings) == 1 else "bits"):
        cls(**settings)


@pytest.mark.parametrize("method", [*QUARTER.values(), QuantizedMethod()], ids=lambda method: method.name)
def test_a_method_is_restored_from_its_settings(method):
    assert type(method)(**method.settings()) == method
    if isinstance(method, DenseMethod):
        assert method.settings()["budget"] == 0.25


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs with CUDA")
def test_offloaded_says_that_it_needs_cuda():
    start = Prefilled(llama(), prompt(LENGTH)[0].tolist())
    with pytest.raises(MethodUnavailableError, match="CUDA"):
        OffloadedMethod().start(start)


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_offloaded_equals_the_stock_cache(family):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    model, ids, tokens = build(*FAMILIES[family]).cuda(), prompt(LENGTH).cuda(), prompt(NEW, seed=1)[0].tolist()
    with started(model, ids, OffloadedMethod()) as (session, start):
        logits = fed(session, tokens).cpu()
        assert session.stats().fast_ratio <= 2 / len(start.full_layers)
    assert (logits - stock_logits(model.cpu(), ids.cpu(), tokens)).abs().max() < 1e-3


BACKENDS = [
    pytest.param("hqq", marks=pytest.mark.skipif(not transformers.utils.is_hqq_available(), reason="pip install hqq")),
    pytest.param(
        "quanto",
        marks=pytest.mark.skipif(not transformers.utils.is_optimum_quanto_available(), reason="pip install optimum-quanto"),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_equals_stock_generation(backend):
    """Compare tokens and logits with `generate`, over several re-quantisations."""
    model, ids = llama(), prompt(LENGTH)
    axis = 1 if backend == "hqq" else 0
    settings = {"backend": backend, "nbits": 2, "q_group_size": 32, "residual_length": 8, "axis_key": axis, "axis_value": axis}
    expected = model.generate(
        ids,
        cache_implementation="quantized",
        cache_config=settings,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = expected.sequences[0, LENGTH:].tolist()
    with started(model, ids, QuantizedMethod(backend=backend, q_group_size=32, residual_length=8)) as (session, start):
        first = start.logits
        logits = torch.cat([first[None], fed(session, tokens[:-1])])
        stats = session.stats()
        codes = sum(tensor_bytes(layer._quantized_keys) for layer in session.cache.layers)
        held = quantized_bytes(session.cache)
    assert (logits - torch.cat(expected.logits)).abs().max() < 1e-4
    assert not torch.equal(logits[1:], stock_logits(model, ids, tokens[:-1]))
    elements = LENGTH * 3 * 2 * 16  # tokens, layers, KV heads, dimension
    assert codes > elements * (2 / 8 + 2 * 2 / 32) * 0.99  # 2 bits, and scale and zero point per 32
    assert 0 < held <= stats.fast_ratio * 4 * elements * (LENGTH + NEW) / LENGTH
    assert 0.15 < stats.fast_ratio < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [LENGTH, LENGTH - 1, LENGTH - 2, LENGTH - 3])
def test_quantized_takes_prompts_of_every_length(backend, length):
    model, ids = llama(), prompt(length)
    with started(model, ids, QuantizedMethod(backend=backend, q_group_size=32, residual_length=8)) as (session, start):
        keys, _ = start.rows(0)
        assert fed(session, list(range(NEW))).isfinite().all()  # more than two residuals
        held, _ = session.cache.layers[0].update(keys[None, :, :1], keys[None, :, :1])  # [1, Hkv, S + NEW + 1, D]
    assert held.shape[2] == length + NEW + 1
    assert (held[0, :, :length] - keys).abs().mean() < 0.5 * keys.abs().mean()


def test_quantized_refuses_a_model_with_sliding_layers():
    start = Prefilled(build(*FAMILIES["gemma3"]), prompt(LENGTH)[0].tolist())
    with pytest.raises(MethodUnavailableError, match="sliding"):
        QuantizedMethod().start(start)


def test_quantized_refuses_a_group_size_that_does_not_fit():
    pytest.importorskip("hqq")
    with pytest.raises(ConfigError, match="q_group_size"):
        QuantizedMethod(q_group_size=48).start(Prefilled(llama(), prompt(LENGTH)[0].tolist()))


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_quantized_names_the_library_that_is_missing(backend, monkeypatch):
    monkeypatch.setattr(transformers.cache_utils, f"is_{'optimum_quanto' if backend == 'quanto' else 'hqq'}_available", bool)
    start = Prefilled(llama(), prompt(LENGTH)[0].tolist())
    with pytest.raises(MethodUnavailableError, match="pip install"):
        QuantizedMethod(backend=backend).start(start)


def test_the_users_attention_setting_is_restored():
    model = llama()
    model.set_attn_implementation("eager")
    with started(model, prompt(LENGTH), SnapKVMethod()) as (session, _):
        session.feed(3)
    assert model.config._attn_implementation == "eager"


def test_a_longrope_switch_in_the_answer_is_refused():
    changes = {"sliding_window": None, "rope_parameters": specache_longrope(), "original_max_position_embeddings": 100}
    model = build("Phi3", changes)
    with started(model, prompt(99), SnapKVMethod()) as (session, _):
        session.feed(3)
        with pytest.raises(specache.SpeCacheError, match="long factors"):
            session.feed(4)


def specache_longrope() -> dict[str, Any]:
    from tests.engine.test_model_families import LONGROPE

    return LONGROPE
