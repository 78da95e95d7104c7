"""The invariants of the method, on packed pages and both RAM tiers, against the stock cache and
against `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

import specache
from specache import reference
from specache.engine import runs
from specache.kernels import dispatch
from specache.kernels.cpu import native
from specache.kernels.torch import operations as torch_ops
from tests.combinations import all_pairs
from tests.tiny import FETCHING, llama, prompt

TIERS = ("ram-inplace", "ram")
EVERYTHING = 10**6
NEW = 40


class Forced:
    """A logits processor that makes a given answer the only one possible."""

    def __init__(self, answer: list[int], start: int) -> None:
        self.answer, self.start = answer, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.answer[input_ids.shape[1] - self.start]] = 0.0
        return forced


def settings(**changes: Any) -> specache.SpeCacheConfig:
    return specache.SpeCacheConfig(**{"group_size": 16, "residual": 16, "prefill_chunk": 70, "top_k": 8, **changes})


def run(
    model: Any,
    ids: torch.Tensor,
    config: specache.SpeCacheConfig,
    new: int = NEW,
    answer: list[int] | None = None,
    cache: specache.SpeCache | None = None,
):
    """Greedy, or along `answer` -> (tokens, logits [new, V], statistics). A cache that is given
    stays open.
    """
    processors = [Forced(answer, ids.shape[1])] if answer else None
    output = specache.generate(
        model,
        ids,
        config=config if cache is None else None,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        logits_processor=processors,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with nullcontext(cache) if cache is not None else output.past_key_values as used:
        return output.sequences[0, ids.shape[1] :].tolist(), torch.cat(output.logits), used.stats()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def undisturbed(model: Any) -> Callable[..., Any]:
    """`run` over the prompt, once for all tests that compare something else with it."""

    @lru_cache
    def run_once(config: specache.SpeCacheConfig, new: int = NEW) -> Any:
        return run(model, prompt(200), config, new)

    return run_once


@pytest.fixture(scope="module")
def references(model: Any, full: tuple[list[int], torch.Tensor]) -> Callable[[specache.SpeCacheConfig], reference.ReferenceOutput]:
    """The reference along the full cache's answer, run once for all tiers: it has none."""

    @lru_cache(maxsize=2)
    def run_once(config: specache.SpeCacheConfig) -> reference.ReferenceOutput:
        return reference.generate(model, prompt(200), config, NEW, forced_tokens=full[0])

    return lambda config: run_once(replace(config, slow_tier="ram"))


@pytest.fixture(scope="module")
def full(model: Any) -> tuple[list[int], torch.Tensor]:
    ids = prompt(200)
    output = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return output.sequences[0, 200:].tolist(), torch.cat(output.logits)


@pytest.mark.parametrize(
    ("policy", "copy", "tier"), all_pairs(FETCHING, [(1, "kivi"), (1, "rotated"), (2, "rotated"), (4, "kivi")], TIERS)
)
def test_fetching_everything_equals_the_full_cache(model, full, policy, copy, tier):
    bits, code = copy
    tokens, logits, _ = run(model, prompt(200), settings(bits=bits, code=code, policy=policy, slow_tier=tier, top_k=EVERYTHING))
    assert tokens == full[0]
    assert (logits - full[1]).abs().max() < 1e-4


def test_the_low_bit_copy_alone_is_not_the_full_cache(model, full):
    _, logits, _ = run(model, prompt(200), settings(bits=1, policy="none"), answer=full[0])
    assert (logits - full[1]).abs().max() > 0.1


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("length", [12, 200])
def test_exact_attention_makes_every_draft_token_right(model, tier, length):
    config = settings(policy="verified", slow_tier=tier, top_k=EVERYTHING)
    assert run(model, prompt(length), config)[2]["guess_rate"] == 1.0


def test_a_prompt_in_the_residual_makes_every_draft_token_of_the_paper_right(model):
    config = settings(policy="speculative", slow_tier="ram", residual=64, group_size=64)
    assert run(model, prompt(60), config)[2]["guess_rate"] == 1.0


@pytest.mark.usefixtures("torch_kernels")
@pytest.mark.parametrize(
    ("policy", "code", "sizes", "tier"),
    all_pairs([*FETCHING, "none"], ["kivi", "rotated"], [(1, 16, 16), (2, 64, 7), (4, 8, 0), (2, 32, 64)], TIERS),
)
def test_every_policy_equals_the_reference(model, full, references, policy, code, sizes, tier):
    bits, group_size, residual = sizes
    settings_ = {"code": code, "bits": bits, "group_size": group_size, "residual": residual, "policy": policy, "slow_tier": tier}
    config = settings(**settings_, prefill_chunk=4096)
    expected = references(config)
    with specache.SpeCache(model, config) as cache:
        _, logits, _ = run(model, prompt(200), config, answer=full[0], cache=cache)
        turned = a_code_turned(cache, expected)
        assert (logits - expected.logits).abs().max() < (5e-3 if turned else 1e-3)


@pytest.mark.usefixtures("torch_kernels")
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("policy", FETCHING)
def test_a_sequence_that_becomes_long_equals_the_reference(model, full, references, policy, tier):
    """In the middle of its answer it begins to select more pairs."""
    config = settings(policy=policy, slow_tier=tier, top_k=2, long_top_k=40, long_from=200, prefill_chunk=4096)
    expected = references(config)
    with specache.SpeCache(model, config) as cache:
        _, logits, _ = run(model, prompt(200), config, answer=full[0], cache=cache)
        turned = a_code_turned(cache, expected)
        assert (logits - expected.logits).abs().max() < (5e-3 if turned else 1e-3)
    few = run(model, prompt(200), config.with_changes(long_top_k=2), answer=full[0])[1]
    differs = (logits - few).abs().amax(-1) > 1e-4
    assert not differs[:20].any() and differs[-8:].all()


def a_code_turned(cache: specache.SpeCache, expected: reference.ReferenceOutput) -> bool:
    """Whether the copies differ, which must be by rounding: the reference sums a prompt's attention
    in another order, and a last-bit difference of a key can turn a code, or the last of a scale's
    16 bits. Which one depends on the processor.
    """
    for index, layer in cache.sequences[0].compressed.items():
        theirs, low_bit_kvs = expected.layers[index], torch_ops.dequantise(layer.low_bit_kv)
        length = theirs.low_bit_keys.shape[1]
        assert layer.low_bit_kv.length == length
        pairs = zip(low_bit_kvs, (theirs.low_bit_keys, theirs.low_bit_values), strict=True)
        apart = torch.stack([(ours - reference_).abs() > 1e-4 for ours, reference_ in pairs])
        if apart.any():  # in the first such layer; those behind it see other keys
            exact = zip(layer.tier.read(index, 0, length), (theirs.keys, theirs.values), strict=True)
            assert max((ours - reference_[:, :length]).abs().max() for ours, reference_ in exact) < 1e-4
            assert apart.float().mean() < 0.01
            return True
    return False


@pytest.mark.skipif(not native.instruction_sets(), reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    ("policy", "copy", "tier"),
    all_pairs([*FETCHING, "none"], [("kivi", 1, 1e-3), ("kivi", 2, 1e-3), ("rotated", 2, 3e-3), ("rotated", 4, 3e-3)], TIERS),
)
def test_the_native_kernels_stay_near_the_reference(model, full, references, monkeypatch, policy, copy, tier):
    """They round queries and weights to 8 bits, so that a token near the k-th may be selected in
    another's place. Both sides decode the same draft tokens, on which the paper's policy depends.
    """
    code, bits, limit = copy
    config = settings(code=code, bits=bits, policy=policy, slow_tier=tier, prefill_chunk=4096)
    expected = references(config)
    drafts = iter([*expected.drafts[1:], 0])
    monkeypatch.setattr(runs, "draft_tokens", lambda *arguments: [next(drafts)])
    with dispatch.using(native.instruction_sets()[-1]):
        logits = run(model, prompt(200), config, answer=full[0])[1].log_softmax(-1)
    likely = expected.logits.log_softmax(-1)
    divergence = torch.nn.functional.kl_div(logits, likely, log_target=True, reduction="none").sum(-1)
    assert divergence.mean() < limit


def force_guesses(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Replace every draft token by a random one."""
    generator = torch.Generator().manual_seed(seed)

    def random_draft(params, context, logits, active):
        return torch.randint(2, 97, (context.shape[0],), generator=generator).tolist()

    monkeypatch.setattr(runs, "draft_tokens", random_draft)


@pytest.mark.parametrize("seed", [1, 2])
def test_verified_does_not_depend_on_the_draft_token(model, undisturbed, monkeypatch, seed):
    config = settings(policy="verified", slow_tier="ram")
    expected_tokens, expected, right = undisturbed(config)
    force_guesses(monkeypatch, seed)
    tokens, logits, wrong = run(model, prompt(200), config)
    assert wrong["guess_rate"] < right["guess_rate"]
    assert tokens == expected_tokens
    assert torch.equal(logits, expected)


def test_the_papers_policy_does_depend_on_the_draft_token(model, monkeypatch):
    config = settings(policy="speculative", slow_tier="ram")
    tokens, expected, _ = run(model, prompt(200), config)
    force_guesses(monkeypatch, 1)
    assert not torch.equal(run(model, prompt(200), config, answer=tokens)[1], expected)


@pytest.mark.parametrize("hot_set", [0.0, 0.05, 1.0, 10_000])
def test_verified_does_not_depend_on_the_tier_or_the_hot_set(model, undisturbed, hot_set):
    expected = undisturbed(settings(policy="verified", slow_tier="ram-inplace"))
    tokens, logits, _ = run(model, prompt(200), settings(policy="verified", slow_tier="ram", hot_set=hot_set))
    assert tokens == expected[0]
    assert torch.equal(logits, expected[1])


@pytest.mark.parametrize("policy", [*FETCHING, "none"])
def test_all_tiers_give_the_same_tokens(model, policy):
    first, *others = (run(model, prompt(230), settings(policy=policy, slow_tier=tier)) for tier in TIERS)
    for other in others:
        assert other[0] == first[0]
        assert (other[1] - first[1]).abs().max() < 1e-5


@pytest.mark.usefixtures("torch_kernels")
def test_verified_gives_the_tokens_of_on_demand(model):
    verified = run(model, prompt(200), settings(policy="verified", slow_tier="ram"))
    on_demand = run(model, prompt(200), settings(policy="on-demand", slow_tier="ram"))
    assert verified[0] == on_demand[0]
    assert (verified[1] - on_demand[1]).abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [1, 16, 63, 199])
@pytest.mark.parametrize(("policy", "top_k"), [("full", 8), ("verified", EVERYTHING), ("previous", EVERYTHING)])
def test_chunked_prefill_equals_unchunked(model, undisturbed, chunk, policy, top_k):
    changes = {"policy": policy, "slow_tier": "ram", "top_k": top_k}
    whole = undisturbed(settings(**changes, prefill_chunk=4096), new=20)
    parts = run(model, prompt(200), settings(**changes, prefill_chunk=chunk), new=20)
    assert parts[0] == whole[0]
    assert (parts[1] - whole[1]).abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [1, 16, 63, 199])
def test_chunked_prefill_stores_what_unchunked_does(model, chunk):
    """The low-bit copies differ in no more than the codes that a last-bit difference in a key can
    turn.
    """
    decoded = []
    for size in (4096, chunk):
        with specache.SpeCache(model, settings(slow_tier="ram", prefill_chunk=size)) as cache:
            specache.prefill(model, prompt(200), cache=cache)
            layers = cache.sequences[0].layers
            assert [layer.low_bit_kv.length for layer in layers.values()] == [176] * 3
            decoded.append([torch.cat(torch_ops.dequantise(layer.low_bit_kv)) for layer in layers.values()])
    for one, other in zip(*decoded, strict=True):
        assert ((one - other).abs() > 0.02).float().mean() < 1e-3


@pytest.mark.parametrize("long", [{}, {"long_top_k": 30, "long_from": 112}])
@pytest.mark.parametrize("tier", TIERS)
def test_a_ragged_batch_equals_each_prompt_alone(model, tier, long):
    config = settings(policy="verified", slow_tier=tier, **long)
    prompts = [prompt(200, 1), prompt(90, 2), prompt(5, 3)]
    ids = torch.zeros(3, 200, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(prompts):
        ids[row, 200 - one.shape[1] :] = one
        mask[row, 200 - one.shape[1] :] = 1
    together = specache.generate(model, ids, attention_mask=mask, config=config, max_new_tokens=NEW, do_sample=False)
    for row, one in enumerate(prompts):
        assert together[row, 200:].tolist() == run(model, one, config)[0]


@pytest.mark.parametrize("policy", FETCHING)
def test_positions_are_never_duplicated_out_of_range_or_padding(model, monkeypatch, policy):
    seen = []
    layer_step = dispatch.layer_step

    def check(positions, lengths):
        seen.append(int((positions >= 0).sum()))
        for of_sequence, length in zip(positions, lengths, strict=True):
            for one in of_sequence.flatten(0, 1):
                kept = one[one >= 0].tolist()
                assert kept == sorted(set(kept))
                assert all(position < length for position in kept)

    def checked(query, low_bit_kvs, *rest):
        step = layer_step(query, low_bit_kvs, *rest)
        attend = step.attend_low_bit
        lengths = [low_bit_kv.length for low_bit_kv in low_bit_kvs]
        monkeypatch.setattr(step, "attend_low_bit", lambda positions: (check(positions, lengths), attend(positions))[1])
        return step

    monkeypatch.setattr(dispatch, "layer_step", checked)
    monkeypatch.setattr(dispatch, "fetches_at_once", lambda *arguments: False)  # no step of one call
    ids = torch.cat([prompt(200, 1), prompt(200, 2)])
    mask = torch.ones_like(ids)
    mask[1, :120] = 0
    config = settings(policy=policy, slow_tier="ram")
    specache.generate(model, ids, attention_mask=mask, config=config, max_new_tokens=NEW, do_sample=False)
    assert sum(seen) > 0


@pytest.mark.parametrize("length", [3, 40, 100])
@pytest.mark.parametrize("code", ["kivi", "rotated"])
def test_a_sequence_cut_to_a_prefix_holds_what_a_fresh_prefill_does(model, code, length):
    """Also where the cut goes behind the tokens that the rotated code's weights were made from."""
    config = settings(code=code, slow_tier="ram")
    with specache.SpeCache(model, config) as cut, specache.SpeCache(model, config) as fresh:
        specache.prefill(model, prompt(200), cache=cut)
        specache.generate(model, prompt(200), past_key_values=cut, max_new_tokens=10, do_sample=False)
        specache.prefill(model, torch.cat([prompt(200)[:, :length], prompt(90, 7)], dim=1), cache=cut)
        specache.prefill(model, torch.cat([prompt(200)[:, :length], prompt(90, 7)], dim=1), cache=fresh)
        for one, other in zip(cut.sequences[0].layers.values(), fresh.sequences[0].layers.values(), strict=True):
            if code == "rotated":
                torch.testing.assert_close(one.key_scales.value, other.key_scales.value, atol=1e-5, rtol=1e-4)
            a, b = torch.cat(torch_ops.dequantise(one.low_bit_kv)), torch.cat(torch_ops.dequantise(other.low_bit_kv))
            assert a.shape == b.shape
            assert ((a - b).abs() > 0.02).float().mean() < 1e-3  # a last-bit difference in a key can turn a code


@pytest.mark.usefixtures("torch_kernels")
def test_a_short_prompt_gets_its_key_scales_while_decoding(model):
    """The first group becomes low bit in the middle of decoding; the rotated code then equals the
    reference.
    """
    config = settings(policy="verified", slow_tier="ram")
    tokens, _, _ = run(model, prompt(12), config)
    expected = reference.generate(model, prompt(12), config, NEW, forced_tokens=tokens)
    _, logits, _ = run(model, prompt(12), config, answer=tokens)
    assert (logits - expected.logits).abs().max() < 1e-3
