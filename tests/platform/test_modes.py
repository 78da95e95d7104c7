"""PyTorch's modes: whatever mode a call runs in, its answer equals stock generate in that mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import linear

import specache
from specache.kernels import packing
from specache.kernels.torch import rotated as torch_rotated
from specache.linear import cpu_linear
from specache.linear.weight_format import WeightFormat
from specache.linear.weight_quant import Int4Linear, Int8Linear, quantise_weights
from specache.platform import modes
from tests.engine.test_model_families import HYBRID, MOE, SIZES
from tests.tiny import llama, prompt

GREEDY = {"max_new_tokens": 6, "do_sample": False}
POLICIES = ["full", "verified", "speculative", "previous", "on-demand"]
Mode = Callable[[], AbstractContextManager[Any]]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # which also fills new memory with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Mode] = {
    "plain": torch.no_grad,
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "autocast-bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast-fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "on-meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(autouse=True)
def no_constants() -> None:
    """Clear the process's cached constants, so that they are created under the tested mode."""
    clear_constants()


def clear_constants() -> None:
    for module in (torch_rotated, packing):
        for kept in vars(module).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


def everything_fetched(**changes: Any) -> specache.SpeCacheConfig:
    return specache.SpeCacheConfig(**{"residual": 16, "group_size": 16, "top_k": 10**6, **changes})


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODES)
def test_answers_are_those_of_stock_generate_in_the_same_mode(model, tmp_path, name, policy):
    ids = prompt(100)
    for tier in ("ram", "ram-inplace", f"disk:{tmp_path}") if policy == "verified" else ("ram",):
        with MODES[name]():
            expected = model.generate(ids, **GREEDY)
            out = specache.generate(model, ids, config=everything_fetched(policy=policy, slow_tier=tier), **GREEDY)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", ["plain", "inference", "autocast-bf16", "float64"])
def test_a_conversation_goes_on_in_another_mode(model, tmp_path, first, second):
    """Filled in one mode, continued, copied and cut in another, and continued in the first
    again.
    """
    start, more, other = prompt(70), prompt(40, seed=2), prompt(9, seed=3)
    tier = f"disk:{tmp_path}" if first == "inference" else "ram"
    cache = specache.SpeCache(model, everything_fetched(slow_tier=tier, policy="verified"))
    with MODES[first]():
        specache.prefill(model, start, cache=cache)
    with MODES[second]():
        text = torch.cat([specache.generate(model, start, past_key_values=cache, **GREEDY), more], 1)
        out = specache.generate(model, text, past_key_values=cache, **GREEDY)
        expected = model.generate(text, **GREEDY)
        copied = copy.deepcopy(cache)
    edited = torch.cat([text[:, :95], other], 1)
    with MODES[first]():
        again = specache.generate(model, edited, past_key_values=copied, **GREEDY)
        assert cache.get_seq_length() == out.shape[1] - 1
        expected_again = model.generate(edited, **GREEDY)
    if first.startswith("autocast") == second.startswith("autocast"):  # else stock continues rounded keys and values too
        assert torch.equal(out, expected) and torch.equal(again, expected_again)
    cache.close()
    copied.close()


def test_stock_continues_a_cache_of_autocast_outside_of_it_and_so_do_we(model):
    """Keys and values keep their rounding: the prompt's are rounded, later ones are not."""
    ids, more = prompt(80), prompt(30, seed=1)
    for first, second in (("autocast-bf16", "plain"), ("plain", "autocast-bf16"), ("autocast-fp16", "autocast-bf16")):
        answers = []
        for cache in (transformers.DynamicCache(), specache.SpeCache(model, everything_fetched(policy="full"))):
            generate = specache.generate if isinstance(cache, specache.SpeCache) else type(model).generate
            with MODES[first]():
                text = generate(model, ids, past_key_values=cache, **GREEDY)
            with MODES[second]():
                answers.append(generate(model, torch.cat([text, more], 1), past_key_values=cache, **GREEDY))
        assert torch.equal(*answers)


@pytest.mark.parametrize("policy", POLICIES)
def test_under_autocast_rows_have_the_models_dtype(model, policy):
    cache = specache.SpeCache(model, everything_fetched(policy=policy, slow_tier="ram"))
    with MODES["autocast-bf16"]():
        specache.generate(model, prompt(100), past_key_values=cache, **GREEDY)
    assert {layer.dtype for layer in cache.sequences[0].layers.values()} == {torch.float32}


def _family(kind: str, config: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**{**SIZES, **changes})).eval()


FAMILIES = {
    "hybrid": lambda: _family(
        "Gemma3ForCausalLM", "Gemma3TextConfig", **{**HYBRID, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2}
    ),
    "softcap": lambda: _family(
        "Gemma2ForCausalLM", "Gemma2Config", **{**HYBRID, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}
    ),
    "experts": lambda: _family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **{**MOE, "head_dim": 16}),
    "biases": lambda: _family("Qwen2ForCausalLM", "Qwen2Config"),
}


@pytest.mark.parametrize("name", ["inference", "autocast-bf16", "float64", "bfloat16", "meta", "deterministic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hybrids_and_mixtures_of_experts_equal_stock_in_every_mode(family, name):
    model, ids = FAMILIES[family](), prompt(60)
    with MODES["plain" if name == "meta" else name]():  # stock's own sliding cache cannot be made on a default device
        expected = model.generate(ids, **GREEDY)
    with MODES[name]():
        for policy in ("verified", "on-demand"):
            out = specache.generate(model, ids, config=everything_fetched(policy=policy, slow_tier="ram"), **GREEDY)
            if family == "softcap" and name.startswith("autocast"):
                assert out.shape == expected.shape  # stock caps scores that are rounded to 16 bits
            else:
                assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_runs_under_autocast(dtype, autocast):
    model = llama().to(dtype)
    with torch.autocast("cpu", dtype=autocast):
        expected = model.generate(prompt(100), **GREEDY)
        for policy in POLICIES:
            out = specache.generate(model, prompt(100), config=everything_fetched(policy=policy), **GREEDY)
            assert out.shape == expected.shape


# A model, prompts and callbacks of an inference mode


def test_weights_and_prompts_that_are_inference_tensors(tmp_path):
    with torch.inference_mode():
        model, ids = llama(), prompt(100)
    assert model.lm_head.weight.is_inference() and ids.is_inference()
    expected = llama().generate(prompt(100), **GREEDY)
    for policy in POLICIES:
        cache = specache.SpeCache(model, everything_fetched(policy=policy))
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                assert torch.equal(specache.generate(model, ids, past_key_values=cache, **GREEDY), expected)


class InPlace:
    """A processor that keeps a tensor of the mode of its first call, and changes it in place."""

    def __init__(self) -> None:
        self.seen: torch.Tensor | None = None
        self.modes: set[tuple[bool, bool]] = set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.seen is None:
            self.seen = torch.zeros_like(scores)
        self.seen.add_(1)
        self.modes.add((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return scores


def test_callbacks_and_the_model_run_in_the_callers_mode(model):
    found = []
    hook = model.register_forward_pre_hook(
        lambda *_: found.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
    )
    processor = InPlace()
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            processor.seen = torch.zeros(1, 97)  # cannot be changed outside of inference mode
            specache.generate(
                model,
                prompt(50),
                config=everything_fetched(),
                logits_processor=transformers.LogitsProcessorList([processor]),
                **GREEDY,
            )
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    finally:
        hook.remove()
    assert processor.modes == {(True, True)} and set(found) == {(True, True, False)}
    assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def test_modes_are_as_they_were_after_an_error(model):
    class Fails:
        def put(self, tokens: Any) -> None:
            raise KeyboardInterrupt

        def end(self) -> None:
            pass

    ids = prompt(50)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        with pytest.raises(KeyboardInterrupt):
            specache.generate(model, ids, streamer=Fails(), **GREEDY)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_default_device().type == "meta"
    assert isinstance(modes.callers(), nullcontext) and modes.ours_again() is None


@pytest.mark.parametrize("first", ["plain", "inference", "autocast-bf16", "float64", "meta"])
@pytest.mark.parametrize("second", ["plain", "inference", "float64", "meta"])
def test_a_session_is_saved_in_one_mode_and_opened_in_another(model, tmp_path, first, second):
    ids, more = prompt(100), prompt(30, seed=2)
    with MODES[first](), specache.Session("one", model, everything_fetched(), folder=tmp_path) as session:
        text = torch.cat([specache.generate(model, ids, past_key_values=session.cache, **GREEDY), more], 1)
        session.save()
    with MODES[second](), specache.Session("one", model, folder=tmp_path) as session:
        out = specache.generate(model, text, past_key_values=session.cache, **GREEDY)
        session.save()
        session.cut(50)
    if not first.startswith("autocast"):
        assert torch.equal(out, model.generate(text, **GREEDY))


def test_the_default_dtype_is_never_changed(model):
    """It belongs to the whole process: another thread would see it."""
    seen = []
    with default_dtype(torch.float64):
        hook = model.register_forward_pre_hook(lambda *_: seen.append(torch.get_default_dtype()))
        try:
            out = specache.generate(
                model, prompt(50), config=everything_fetched(), output_scores=True, return_dict_in_generate=True, **GREEDY
            )
        finally:
            hook.remove()
        assert torch.get_default_dtype() is torch.float64
    assert set(seen) == {torch.float64}
    assert {scores.dtype for scores in out.scores} == {torch.float32}


@pytest.mark.parametrize("name", MODES)
def test_process_wide_constants_do_not_depend_on_the_mode_of_the_first_call(name):
    def kept() -> list[torch.Tensor]:
        cpu = torch.device("cpu")
        rotated = [torch_rotated.rotation(48, cpu), torch_rotated.levels(2, cpu)]
        return [*rotated, packing.byte_table(2, cpu), packing.places(20, 40, 2, cpu), packing.slots(40, 2, cpu)]

    expected = kept()
    clear_constants()
    with MODES[name]():
        found = kept()
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.device == theirs.device and not mine.is_inference()
        assert torch.equal(mine, theirs)


# Products


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 20, 400])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fast_product_under_autocast_is_that_of_an_ordinary_linear_layer(monkeypatch, rows, autocast, weight, bias):
    monkeypatch.setattr(cpu_linear, "multiplies_natively", lambda dtype: False)
    torch.manual_seed(rows)
    layer = torch.nn.Linear(32, 48, bias=bias).to(weight)
    x = torch.randn(rows, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast):
        for inputs in (x, x.to(autocast)):
            expected = layer(inputs)
            changed = cpu_linear.install(torch.nn.ModuleList([layer]))
            assert changed
            try:
                out = layer(inputs)
            finally:
                cpu_linear.remove(changed)
            assert out.dtype == expected.dtype == autocast and torch.equal(out, expected)


@pytest.mark.parametrize("made", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("rows", [2, 400])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_quantised_layers_under_autocast_round_as_a_linear_layer_does(made, rows, autocast):
    torch.manual_seed(0)
    layer = made(torch.randn(64, 96), torch.randn(64))
    matrix = layer(torch.eye(96)).sub(layer.bias).T  # what the codes stand for
    x = torch.randn(3, rows, 96)
    with torch.autocast("cpu", dtype=autocast):
        for inputs in (x, x.to(autocast)):
            out = layer(inputs)
            assert out.dtype is autocast
            expected = linear(inputs, matrix, layer.bias)
            assert float((out - expected).float().norm() / expected.float().norm()) < 0.01


@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.INT4])
@pytest.mark.parametrize("name", ["inference", "autocast-bf16", "autocast-fp16", "float64", "meta"])
def test_a_model_with_quantised_weights_answers_as_its_stock_generate(weights, name):
    model = llama(vocab_size=96)
    quantise_weights(model, weights)
    ids = prompt(80).clamp(max=95)
    with MODES[name]():
        expected = model.generate(ids, **GREEDY)
        for policy in ("full", "verified"):
            assert torch.equal(specache.generate(model, ids, config=everything_fetched(policy=policy), **GREEDY), expected)


def test_changing_the_number_of_threads_between_calls_changes_no_answer(model):
    cache, ids = specache.SpeCache(model, everything_fetched(slow_tier="ram")), prompt(100)
    before = torch.get_num_threads()
    try:
        for threads in (2, 1, 3):
            torch.set_num_threads(threads)
            ids = specache.generate(model, ids, past_key_values=cache, **GREEDY)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ids, model.generate(prompt(100), max_new_tokens=18, do_sample=False))


def test_generate_runs_under_the_profiler(model):
    with torch.autograd.profiler.profile() as profile:
        out = specache.generate(model, prompt(60), config=everything_fetched(), **GREEDY)
    assert profile.function_events and torch.equal(out, model.generate(prompt(60), **GREEDY))


def test_a_caller_that_is_compiled_gets_the_same_answer(model):
    ids = prompt(50)
    compiled = torch.compile(
        lambda ids: specache.generate(model, ids + 0, config=everything_fetched(), **GREEDY) * 1, backend="eager"
    )
    assert torch.equal(compiled(ids), model.generate(ids, **GREEDY))
