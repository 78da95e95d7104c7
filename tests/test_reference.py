"""The oracle equals stock where it must, follows Algorithms 1-3, and quantises as KIVI does."""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig

from specache.config import Policy, SpeCacheConfig, TopK
from specache.errors import ConfigError, UsageError
from specache.reference import (
    NAME,
    ReferenceState,
    attention_function,
    dequantise_keys,
    dequantise_values,
    generate,
    quantise_keys,
    quantise_values,
    select,
)

FETCHING = [Policy.VERIFIED, Policy.SPECULATIVE, Policy.ON_DEMAND, Policy.PREVIOUS]
ALL = [*FETCHING, Policy.NONE, Policy.FULL]
PROMPT, NEW, VOCAB = 43, 14, 61
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,  # large, so that attention is peaked and the low-bit copy matters
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**TINY),
    "gemma2": lambda: Gemma2Config(**TINY, sliding_window=16, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "gpt-oss": lambda: GptOssConfig(**TINY, sliding_window=16, num_local_experts=4, num_experts_per_tok=2),
    "mistral, every layer sliding": lambda: MistralConfig(**TINY, sliding_window=16),
    "mistral, window of all positions": lambda: MistralConfig(**TINY, sliding_window=128),
}
FAMILIES = ["llama", "gemma2", "gpt-oss"]


@cache
def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.fill_(1.5)  # enough to change every probability
    return model


def prompt_ids(length: int = PROMPT) -> Tensor:
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(2))


@cache
def stock(family: str, prompt: int = PROMPT, new: int = NEW) -> tuple[list[int], Tensor]:
    """Return tokens and logits `[new, V]` of transformers' greedy generation with its own cache."""
    model, ids = tiny_model(family), prompt_ids(prompt)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=DynamicCache(config=model.config),
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, prompt:].tolist(), torch.cat(out.logits)


def settings(policy: Policy, **changes: Any) -> SpeCacheConfig:
    return SpeCacheConfig(**{"code": "kivi", "bits": 2, "group_size": 8, "residual": 8, "top_k": 4, "policy": policy, **changes})


def wrong(tokens: list[int]) -> list[int]:
    return [(token + 1) % VOCAB for token in tokens]


# --- Against transformers ---


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("policy", FETCHING)
@pytest.mark.parametrize("family", FAMILIES)
def test_fetching_everything_equals_stock_generation(family: str, policy: Policy, bits: int) -> None:
    tokens, logits = stock(family)
    out = generate(tiny_model(family), prompt_ids(), settings(policy, bits=bits, top_k=PROMPT + NEW), NEW)
    assert out.tokens == tokens
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_policy_full_equals_stock_generation(family: str) -> None:
    tokens, logits = stock(family)
    assert len(set(tokens)) > 3, "a model that repeats itself would hide mistakes"
    out = generate(tiny_model(family), prompt_ids(), settings(Policy.FULL), NEW)
    assert out.tokens == tokens
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", [*FETCHING, Policy.NONE])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral, window of all positions"])
def test_attention_reads_the_low_bit_copy(family: str, policy: Policy) -> None:
    tokens, logits = stock(family)
    out = generate(tiny_model(family), prompt_ids(), settings(policy, top_k=1), NEW, forced_tokens=tokens)
    torch.testing.assert_close(out.logits[0], logits[0], rtol=0, atol=1e-4)  # the prefill is exact
    assert (out.logits[1:] - logits[1:]).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize("policy", ALL)
def test_sliding_layers_stay_exact(policy: Policy) -> None:
    family = "mistral, every layer sliding"
    tokens, logits = stock(family)
    out = generate(tiny_model(family), prompt_ids(), settings(policy, bits=1, top_k=1), NEW)
    assert out.tokens == tokens
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_keep_their_rows_unchanged(dtype: torch.dtype) -> None:
    model, ids = tiny_model("llama", dtype), prompt_ids()
    full = generate(model, ids, settings(Policy.FULL), NEW)
    fetched = generate(model, ids, settings(Policy.ON_DEMAND, bits=1, top_k=PROMPT + NEW), NEW)
    copy = generate(model, ids, settings(Policy.NONE, bits=1), NEW, forced_tokens=full.tokens)
    assert full.logits.dtype == torch.float32
    assert torch.equal(fetched.logits, full.logits)
    assert not torch.equal(copy.logits, full.logits)


def test_forced_tokens_are_emitted_and_fed() -> None:
    model, ids = tiny_model("llama"), prompt_ids()
    forced = wrong(stock("llama")[0])
    out = generate(model, ids, settings(Policy.FULL), NEW, forced_tokens=forced)
    with torch.no_grad():
        logits = model(torch.cat([ids, torch.tensor([forced])], dim=1)).logits[0, PROMPT - 1 : -1]  # [NEW, V]
    assert out.tokens == forced
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_own_attention_is_restored(fails: bool) -> None:
    model = tiny_model("llama")
    if fails:
        with pytest.raises(IndexError):
            generate(model, prompt_ids(), settings(Policy.VERIFIED), 3, forced_tokens=[VOCAB] * 3)
    else:
        generate(model, prompt_ids(), settings(Policy.VERIFIED), 3)
    assert model.config._attn_implementation == "eager"


# --- Speculation ---


@pytest.mark.parametrize("family", FAMILIES)
def test_verified_logits_do_not_depend_on_the_draft_token(family: str) -> None:
    model, ids, config = tiny_model(family), prompt_ids(), settings(Policy.VERIFIED)
    own = generate(model, ids, config, NEW)
    drafts = wrong(own.tokens)
    misled = generate(model, ids, config, NEW, forced_drafts=drafts)
    assert misled.drafts == [None, *drafts[1:]]
    assert misled.tokens == own.tokens
    tolerance = 1e-5 if family == "gpt-oss" else 0.0  # another row changes how a mixture of experts is grouped
    torch.testing.assert_close(misled.logits, own.logits, rtol=0, atol=tolerance)


def test_speculative_logits_depend_on_the_draft_token() -> None:
    model, ids, config = tiny_model("llama"), prompt_ids(), settings(Policy.SPECULATIVE)
    own = generate(model, ids, config, NEW)
    misled = generate(model, ids, config, NEW, forced_tokens=own.tokens, forced_drafts=wrong(own.tokens))
    assert torch.equal(misled.logits[:2], own.logits[:2])  # the first pair uses what pre-decoding selected
    assert (misled.logits[2:] - own.logits[2:]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_verified_equals_on_demand(family: str) -> None:
    model, ids = tiny_model(family), prompt_ids()
    verified = generate(model, ids, settings(Policy.VERIFIED), NEW)
    on_demand = generate(model, ids, settings(Policy.ON_DEMAND), NEW)
    assert verified.tokens == on_demand.tokens
    assert on_demand.drafts == [None] * NEW
    torch.testing.assert_close(verified.logits, on_demand.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", [Policy.VERIFIED, Policy.SPECULATIVE])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_draft_token_is_right_while_nothing_is_quantised(family: str, policy: Policy) -> None:
    prompt, new = 20, 12
    config = settings(policy, residual=prompt + new, bits=1)
    out = generate(tiny_model(family), prompt_ids(prompt), config, new)
    assert out.tokens == stock(family, prompt, new)[0]
    assert out.drafts == [None, *out.tokens[1:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_draft_token_is_right_when_every_pair_is_fetched(family: str) -> None:
    model, ids = tiny_model(family), prompt_ids()
    out = generate(model, ids, settings(Policy.VERIFIED, bits=1, top_k=PROMPT + NEW), NEW)
    assert out.drafts == [None, *out.tokens[1:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_speculative_draft_tokens_are_right_after_a_right_first_one(family: str) -> None:
    """Pre-decoding attends to low-bit pairs alone, so only the first draft may be wrong."""
    model, ids = tiny_model(family), prompt_ids()
    first = [None, stock(family)[0][1], *[None] * (NEW - 2)]
    config = settings(Policy.SPECULATIVE, bits=1, top_k=PROMPT + NEW)
    out = generate(model, ids, config, NEW, forced_drafts=first)
    assert out.drafts == [None, *out.tokens[1:]]


def test_draft_tokens_from_low_bit_attention_can_be_wrong() -> None:
    out = generate(tiny_model("llama"), prompt_ids(), settings(Policy.SPECULATIVE, bits=1, top_k=1), NEW)
    assert out.drafts != [None, *out.tokens[1:]]


# --- One layer against a loop over positions ---


class OneHead:
    """Algorithms 1-3 for one KV head in float64, by a loop over positions."""

    def __init__(self, config: SpeCacheConfig, scaling: float, softcap: float | None, sinks: list[float] | None):
        self.config, self.scaling, self.softcap, self.sinks = config, scaling, softcap, sinks
        self.keys: list[Tensor] = []  # n rows [D]
        self.values: list[Tensor] = []
        self.fetched: set[int] = set()

    def low_bit_length(self) -> int:
        return 0 if self.config.policy is Policy.FULL else self.config.low_bit_length(len(self.keys))

    def row(self, queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, list[float]]:
        """Return outputs `[G, D]` of queries `[G, D]`, and the mean probability per position."""
        outputs, mean = [], [0.0] * len(keys)
        for g, query in enumerate(queries):
            scores = [self.scaling * float(query @ key) for key in keys]
            if self.softcap:
                scores = [self.softcap * math.tanh(score / self.softcap) for score in scores]
            total = sum(map(math.exp, scores)) + (math.exp(self.sinks[g]) if self.sinks else 0.0)
            weights = [math.exp(score) / total for score in scores]
            mean = [m + weight / len(queries) for m, weight in zip(mean, weights, strict=True)]
            outputs.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        return torch.stack(outputs), mean

    def top_k(self, mean: list[float], candidates: int) -> set[int]:
        return set(sorted(range(candidates), key=lambda position: -mean[position])[: self.config.top_k])

    def mixed(self, low_bit_length: int, fetched: set[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the committed pairs: low-bit below `low_bit_length` unless fetched, else exact."""
        bits, g = self.config.bits, self.config.group_size
        keys, values = list(self.keys), list(self.values)
        if low_bit_length:
            K, V = torch.stack(keys[:low_bit_length])[None].float(), torch.stack(values[:low_bit_length])[None].float()
            low_keys = dequantise_keys(*quantise_keys(K, bits, g), g)[0].double()
            low_values = dequantise_values(*quantise_values(V, bits, g), g)[0].double()
            for position in set(range(low_bit_length)) - fetched:
                keys[position], values[position] = low_keys[position], low_values[position]
        return keys, values

    def prefill(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.keys, self.values = list(keys), list(values)
        rows = [self.row(queries[:, p], self.keys[: p + 1], self.values[: p + 1])[0] for p in range(len(keys))]
        if self.config.policy is Policy.PREVIOUS:
            _, mean = self.row(queries[:, -1], *self.mixed(self.low_bit_length(), set()))
            self.fetched = self.top_k(mean, self.low_bit_length())
        return torch.stack(rows, dim=1)  # [G, S, D]

    def decode(self, queries: Tensor, keys: Tensor, values: Tensor, committed: int) -> Tensor:
        low_bit_length, fetched, policy, rows = self.low_bit_length(), self.fetched, self.config.policy, []
        for i in range(len(keys)):
            new_keys, new_values = list(keys[: i + 1]), list(values[: i + 1])
            if policy in (Policy.VERIFIED, Policy.ON_DEMAND):
                low_keys, low_values = self.mixed(low_bit_length, set())
                _, mean = self.row(queries[:, i], low_keys + new_keys, low_values + new_values)
                fetched = self.top_k(mean, low_bit_length)
            old_keys, old_values = self.mixed(low_bit_length, fetched)
            out, mean = self.row(queries[:, i], old_keys + new_keys, old_values + new_values)
            rows.append(out)
        self.keys += list(keys[:committed])
        self.values += list(values[:committed])
        if policy in (Policy.SPECULATIVE, Policy.PREVIOUS):
            self.fetched = self.top_k(mean, self.low_bit_length())
        return torch.stack(rows, dim=1)  # [G, q, D]


@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("residual", [0, 3])
@pytest.mark.parametrize("policy", ALL)
def test_a_layer_equals_a_loop_over_positions(policy: Policy, residual: int, extras: str) -> None:
    """Prefill, pre-decode and four steps run, and two groups leave the residual."""
    Hkv, G, D, S = 2, 3, 6, 18
    config = settings(policy, group_size=4, residual=residual, top_k=5)
    softcap, sinks = (2.0 if extras == "softcap" else None), torch.linspace(-1, 2, Hkv * G)
    heads = [OneHead(config, 0.7, softcap, sinks[h * G : (h + 1) * G].tolist() if extras == "sinks" else None) for h in range(Hkv)]
    module = SimpleNamespace(layer_idx=0, config=SimpleNamespace(max_position_embeddings=100))
    state = ReferenceState(config)
    options = {"scaling": 0.7, "softcap": softcap, NAME: state} | ({"s_aux": sinks} if extras == "sinks" else {})
    steps = [(1, 0)] * config.policy.drafts + [(2 if config.policy.drafts else 1, 1)] * 4  # (rows, committed)
    torch.manual_seed(3)
    for rows, committed in [(S, S), *steps]:
        q, k, v = (torch.randn(1, n, rows, D) for n in (Hkv * G, Hkv, Hkv))
        state.committed = committed
        out, _ = attention_function(module, q, k, v, None, **options)  # [1, rows, Hq, D]
        expected = []
        for h, head in enumerate(heads):
            queries, keys, values = q[0, h * G : (h + 1) * G].double(), k[0, h].double(), v[0, h].double()
            prefill = rows == S
            expected.append(head.prefill(queries, keys, values) if prefill else head.decode(queries, keys, values, committed))
        torch.testing.assert_close(out[0].transpose(0, 1).double(), torch.cat(expected), rtol=0, atol=1e-5)
        for h, head in enumerate(heads):  # the state between passes, beside what they returned
            assert state.layers[0].fetched_positions[h].tolist() == sorted(head.fetched)


def test_select_averages_over_query_heads_and_breaks_ties_downwards() -> None:
    probabilities = torch.tensor([[[0.0, 0.5, 0.2, 0.2, 0.1]], [[0.4, 0.1, 0.2, 0.2, 0.1]]])[None]  # [1, G=2, 1, 5]
    # means: .2, .3, .2, .2, .1
    assert select(probabilities, 5, TopK.always(1)).tolist() == [[1]]
    assert select(probabilities, 5, TopK.always(3)).tolist() == [[0, 1, 2]]
    assert select(probabilities, 5, TopK.always(9)).tolist() == [[0, 1, 2, 3, 4]]
    assert select(probabilities[..., [4, 3, 2, 1, 0]], 3, TopK.always(1)).tolist() == [[1]]  # position 3 is no candidate
    assert select(torch.ones(1, 1, 1, 500), 400, TopK.always(7)).tolist() == [list(range(7))]
    assert [len(select(probabilities, n, TopK(1, 3, 4))[0]) for n in (3, 4)] == [1, 3]  # four candidates are a long sequence


# --- The code ---


def per_key_group(x: Tensor, g: int) -> Tensor:
    """Expand parameters `[Hkv, n/g, D]` to `[Hkv, n, D]`."""
    return x.float().repeat_interleave(g, dim=1)


@pytest.mark.parametrize("g", [4, 16, 64])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_shapes_dtypes_and_range_of_codes(bits: int, g: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 128, 24, dtype=torch.bfloat16)
    codes, scale, zero = quantise_keys(x, bits, g)
    assert codes.shape == x.shape and scale.shape == zero.shape == (2, 128 // g, 24)
    assert codes.dtype == torch.uint8 and scale.dtype == zero.dtype == torch.float16
    assert codes.min() == 0 and codes.max() == 2**bits - 1
    codes, scale, zero = quantise_values(x, bits, g)
    assert codes.shape == x.shape and scale.shape == zero.shape == (2, 128, math.ceil(24 / g))
    assert codes.dtype == torch.uint8 and scale.dtype == zero.dtype == torch.float16
    assert codes.min() == 0 and codes.max() == 2**bits - 1


@pytest.mark.parametrize("bits", [2, 4])
def test_error_is_at_most_half_a_step(bits: int) -> None:
    torch.manual_seed(0)
    x, g, top = torch.randn(2, 64, 24) * torch.logspace(-3, 3, 24), 8, 2**bits - 1
    codes, scale, zero = quantise_keys(x, bits, g)
    z, s = per_key_group(zero, g), per_key_group(scale, g)
    error = (dequantise_keys(codes, scale, zero, g) - x).abs()
    rounding = 2**-10 * (z.abs() + top * s) + 1e-6  # of z and s to float16
    assert (error <= s / 2 + rounding).all()
    inside = (x >= z) & (x <= z + top * s)  # where the rounded range reaches, nothing is added
    assert inside.float().mean() > 0.5
    assert (error <= s / 2 * (1 + 1e-4) + 1e-6)[inside].all()
    assert error.max() > 0.4 * s.max()  # a finer code than asked for would pass all of the above


def test_one_bit_levels_lie_at_the_quarter_points() -> None:
    x = torch.tensor([-4.0, -3.0, 3.0, 4.0]).reshape(1, 4, 1)  # min -4, max 4: levels -2 and 2
    codes, scale, zero = quantise_keys(x, 1, 4)
    assert (float(zero), float(scale)) == (-2.0, 4.0)
    assert dequantise_keys(codes, scale, zero, 4).flatten().tolist() == [-2.0, -2.0, 2.0, 2.0]
    codes, scale, zero = quantise_values(x.reshape(1, 1, 4), 1, 4)
    assert dequantise_values(codes, scale, zero, 4).flatten().tolist() == [-2.0, -2.0, 2.0, 2.0]


def test_two_bit_levels_span_minimum_to_maximum() -> None:
    x = torch.tensor([0.0, 1.2, 1.9, 3.0]).reshape(1, 4, 1)
    codes, scale, zero = quantise_keys(x, 2, 4)
    assert (float(zero), float(scale)) == (0.0, 1.0)
    assert codes.flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("value", [0.0, -0.1, 3.14159, 1e-9, 6.1e-5, 1234.5, -65504.0])
def test_constant_groups_decode_to_themselves(value: float, bits: int) -> None:
    x = torch.full((2, 16, 10), value)
    expected = x.half().float()
    assert quantise_keys(x, bits, 8)[0].max() == quantise_values(x, bits, 8)[0].max() == 0  # code 0, never x / 0
    torch.testing.assert_close(dequantise_keys(*quantise_keys(x, bits, 8), 8), expected, rtol=0, atol=0)
    torch.testing.assert_close(dequantise_values(*quantise_values(x, bits, 8), 8), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-8, 1e-7, 1.0, 7e4, 3e38])
def test_codes_never_decode_to_nan(magnitude: float, bits: int) -> None:
    torch.manual_seed(0)
    x = (torch.rand(2, 16, 10) * 2 - 1) * magnitude
    assert dequantise_keys(*quantise_keys(x, bits, 8), 8).isfinite().all()
    assert dequantise_values(*quantise_values(x, bits, 8), 8).isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_short_last_value_group_is_a_group_of_its_own(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 11)
    codes, scale, zero = quantise_values(x, bits, 4)  # 4 + 4 + 3 channels
    assert scale.shape == (2, 5, 3)
    for start, stop in [(0, 4), (4, 8), (8, 11)]:
        alone = quantise_values(x[..., start:stop].clone(), bits, 64)  # one group: g is at most D
        assert torch.equal(codes[..., start:stop], alone[0])
        assert torch.equal(scale[..., start // 4], alone[1][..., 0]) and torch.equal(zero[..., start // 4], alone[2][..., 0])
    joined = dequantise_values(codes, scale, zero, 4)
    torch.testing.assert_close(joined[..., 8:], dequantise_values(*alone, 64), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_key_groups_do_not_mix(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 24, 5)
    whole = dequantise_keys(*quantise_keys(x, bits, 8), 8)
    for start in (0, 8, 16):
        part = x[:, start : start + 8]
        assert torch.equal(whole[:, start : start + 8], dequantise_keys(*quantise_keys(part, bits, 8), 8))
    assert dequantise_keys(*quantise_keys(x[:, :0], bits, 8), 8).shape == (2, 0, 5)


# --- Mistakes ---


def test_invalid_arguments_are_refused() -> None:
    model, config = tiny_model("llama"), settings(Policy.VERIFIED)
    with pytest.raises(UsageError, match=r"\[1, S\]"):
        generate(model, torch.zeros(2, 5, dtype=torch.long), config, 3)
    with pytest.raises(UsageError, match="token to generate"):
        generate(model, prompt_ids(), config, 0)
    with pytest.raises(UsageError, match="3 entries"):
        generate(model, prompt_ids(), config, 3, forced_drafts=[None, 1])
    with pytest.raises(UsageError, match="whole groups of 8"):
        quantise_keys(torch.zeros(1, 9, 2), 2, 8)
    with pytest.raises(ConfigError):
        settings(Policy.VERIFIED, bits=3)
