"""Generation as in transformers: sampling, stopping, streaming, conversations, interrupts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import specache
from tests.our_threads import our_new_threads
from tests.tiny import llama, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def settings(**changes: Any) -> specache.SpeCacheConfig:
    return specache.SpeCacheConfig(
        **{"group_size": 16, "residual": 16, "slow_tier": "ram", "policy": "verified", "top_k": 10**6, **changes}
    )


class Recorder:
    """A streamer that records its calls, and may raise."""

    def __init__(self, raise_at: int | None = None) -> None:
        self.got: list[list[int]] = []
        self.ended = 0
        self.raise_at = raise_at

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())
        if len(self.got) == self.raise_at:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


SAMPLED = {
    "greedy": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "top-p": {"do_sample": True, "top_p": 0.8, "temperature": 1.3},
    "min-p": {"do_sample": True, "min_p": 0.05, "top_k": 20},
    "repetition": {"do_sample": False, "repetition_penalty": 1.5},
    "ngram": {"do_sample": False, "no_repeat_ngram_size": 2},
    "min-tokens": {"do_sample": False, "min_new_tokens": 10, "eos_token_id": [5, 9, 11, 20, 31]},
    "several-eos": {"do_sample": True, "eos_token_id": list(range(2, 30))},
    "returns": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("policy", ["full", "verified", "on-demand"])
@pytest.mark.parametrize("case", SAMPLED)
def test_the_same_seed_gives_the_tokens_of_stock(model, case, policy):
    ids = prompt(80)
    arguments = {"max_new_tokens": 30, "attention_mask": torch.ones_like(ids), **SAMPLED[case]}
    torch.manual_seed(7)
    expected = model.generate(ids, **arguments)
    torch.manual_seed(7)
    assert torch.equal(specache.generate(model, ids, config=settings(policy=policy), **arguments), expected)


def test_scores_and_logits_are_those_of_stock(model):
    ids = prompt(80)
    arguments = {
        "max_new_tokens": 10,
        "do_sample": False,
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected = model.generate(ids, **arguments)
    output = specache.generate(model, ids, config=settings(), **arguments)
    with output.past_key_values:
        torch.testing.assert_close(torch.stack(output.scores), torch.stack(expected.scores), atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("slow_tier", ["ram", "disk", "ram-inplace"])
@pytest.mark.parametrize("policy", list(specache.Policy))
def test_equal_prompts_get_equal_answers(model, tmp_path, policy, slow_tier):
    """They are prefilled once, and the others are forks."""
    if slow_tier == "ram-inplace" and not (policy.verifies or policy is specache.Policy.FULL):
        pytest.skip("nothing is prefetched in place")
    folder = {"slow_dir": str(tmp_path)} if slow_tier == "disk" else {}
    config = settings(policy=policy, slow_tier=slow_tier, top_k=24, **folder)
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    alone = specache.generate(model, prompt(90), config=config, **options)
    batch = specache.generate(model, prompt(90).expand(3, -1), config=config, **options)
    with alone.past_key_values, batch.past_key_values:
        assert torch.equal(batch.sequences, alone.sequences.expand(3, -1))
        torch.testing.assert_close(torch.stack(batch.logits), torch.stack(alone.logits).expand(-1, 3, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("through_stock", [True, False])
def test_a_streamer_gets_prompt_and_tokens_and_is_ended(model, through_stock):
    ids, streamer = prompt(40), Recorder()
    if through_stock:
        tokens = model.generate(
            ids, custom_generate=specache.decode, config=settings(), streamer=streamer, max_new_tokens=5, do_sample=False
        )
    else:
        tokens = specache.generate(model, ids, config=settings(), streamer=streamer, max_new_tokens=5, do_sample=False)
    assert streamer.got == [ids[0].tolist(), *([token] for token in tokens[0, 40:].tolist())]
    assert streamer.ended == 1


def test_an_error_in_the_middle_ends_the_streamer_and_the_background_thread(model):
    def failing(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 63:
            raise RuntimeError("from a processor")
        return scores

    streamer = Recorder()
    with pytest.raises(RuntimeError, match="from a processor"):
        specache.generate(model, prompt(60), config=settings(), streamer=streamer, logits_processor=[failing], max_new_tokens=9)
    assert streamer.ended == 1
    assert model.config._attn_implementation == "sdpa"
    assert not our_new_threads()


@pytest.mark.parametrize("policy", ["verified", "speculative", "on-demand", "previous"])
def test_a_conversation_continues_as_if_it_had_been_prefilled_at_once(model, policy):
    config = settings(policy=policy)
    with specache.SpeCache(model, config) as cache:
        first = specache.generate(model, prompt(90, 1), past_key_values=cache, max_new_tokens=20, do_sample=False)
        second = torch.cat([first, prompt(30, 2)], dim=1)
        answer = specache.generate(model, second, past_key_values=cache, max_new_tokens=20, do_sample=False)
        assert torch.equal(answer, model.generate(second, max_new_tokens=20, do_sample=False))
        changed = torch.cat([second[:, :50], prompt(40, 3)], dim=1)
        answer = specache.generate(model, changed, past_key_values=cache, max_new_tokens=20, do_sample=False)
        assert torch.equal(answer, model.generate(changed, max_new_tokens=20, do_sample=False))


def test_only_the_new_tokens_with_a_longer_mask_continue_too(model):
    with specache.SpeCache(model, settings()) as cache:
        specache.prefill(model, prompt(90, 1), cache=cache)
        new, mask = prompt(30, 2), torch.ones(1, 120, dtype=torch.long)
        answer = specache.generate(model, new, attention_mask=mask, past_key_values=cache, max_new_tokens=20, do_sample=False)
        full = torch.cat([prompt(90, 1), new], dim=1)
        assert answer[0, 30:].tolist() == model.generate(full, max_new_tokens=20, do_sample=False)[0, 120:].tolist()


def test_an_interrupted_answer_leaves_a_cache_that_continues(model):
    ids = prompt(70)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    with specache.SpeCache(model, settings()) as cache:
        streamer = Recorder(raise_at=12)
        with pytest.raises(KeyboardInterrupt):
            specache.generate(model, ids, past_key_values=cache, streamer=streamer, max_new_tokens=30, do_sample=False)
        assert streamer.ended == 1
        assert cache.finish_reasons == ["interrupted"]
        assert cache.get_seq_length() == 80
        answer = specache.generate(model, ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
        assert torch.equal(answer, expected)
        assert cache.finish_reasons == ["length"]


def test_a_failed_pass_is_undone_in_every_layer(model, monkeypatch):
    ids = prompt(70)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    with specache.SpeCache(model, settings()) as cache:
        specache.prefill(model, ids, cache=cache)
        layer = model.model.layers[2].self_attn

        def failing(*args: Any, **kwargs: Any) -> Any:
            raise MemoryError

        for count in (0, 9):
            specache.generate(model, ids, past_key_values=cache, max_new_tokens=count + 1, do_sample=False)
            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                patch.setattr(layer, "forward", failing)
                specache.generate(model, ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
            assert len({layer.length for layer in cache.sequences[0].layers.values()}) == 1
        answer = specache.generate(model, ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
        assert torch.equal(answer, expected)


def test_forks_share_the_prefill_and_do_not_disturb_each_other(model):
    ids = prompt(150)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with specache.SpeCache(model, settings()) as cache:
        specache.prefill(model, ids, cache=cache)
        for policy in ("full", "on-demand", "speculative", "previous"):
            with cache.fork(policy=policy) as fork:
                answer = specache.generate(model, ids, past_key_values=fork, max_new_tokens=20, do_sample=False)
                assert torch.equal(answer, expected), policy
                assert fork.stats()["prefill_s"] >= cache.stats()["prefill_s"]
        answer = specache.generate(model, ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
        assert torch.equal(answer, expected)


def padded(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


BAD = {
    "empty prompt": ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "prompt is empty"),
    "no prompt": ({"input_ids": None}, "no prompt"),
    "all padding": ({"attention_mask": torch.zeros(1, 8, dtype=torch.long)}, "empty"),
    "hole": ({"attention_mask": padded([1, 1, 0, 1, 1, 1, 1, 1])}, "holes"),
    "right padding": ({"attention_mask": padded([1, 1, 1, 1, 1, 1, 0, 0])}, "left"),
    "too long": ({"input_ids": prompt(2049)}, "2,049 tokens"),
    "no new tokens": ({"max_new_tokens": 0}, "at least 1"),
    "no chunk": ({"prefill_chunk_size": 0}, "prefill_chunk_size"),
    "no whole chunk": ({"prefill_chunk_size": 7.5}, "prefill_chunk_size"),
    "beams": ({"num_beams": 2}, "num_beams"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "no cache": ({"use_cache": False}, "use_cache"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 8, 64)}, "inputs_embeds"),
    "stock cache": ({"past_key_values": DynamicCache()}, "SpeCache"),
    "cache implementation": ({"cache_implementation": "static"}, "cache_implementation"),
    "stop strings without tokenizer": ({"stop_strings": ["x"]}, "tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unsupported_request_is_refused(model, case):
    changes, message = BAD[case]
    with pytest.raises(specache.SpeCacheError, match=message):
        specache.generate(model, **{"input_ids": prompt(8), "max_new_tokens": 4, "config": settings(), **changes})
    assert not our_new_threads()


def test_steps_in_time_with_other_processes_are_refused(model):
    with pytest.raises(specache.UsageError, match="synced_gpus"):
        specache.generate(model, prompt(8), synced_gpus=True)
    assert specache.generate(model, prompt(8), synced_gpus=False, max_new_tokens=1).shape[1] == 9


def test_an_assistant_model_is_refused(model):
    with pytest.raises(specache.UsageError, match="assistant_model"):
        specache.generate(model, prompt(8), assistant_model=model)
    with pytest.raises(specache.UsageError, match="assistant_model"):
        model.generate(prompt(8), custom_generate=specache.decode, assistant_model=model)


def test_the_model_and_stock_generate_refuse_a_specache_with_what_to_call(model):
    with specache.SpeCache(model, settings()) as cache:
        with pytest.raises(specache.UsageError, match=r"specache\.generate"):
            model(prompt(8), past_key_values=cache)
        with pytest.raises(specache.UsageError, match=r"specache\.generate"):
            model.generate(prompt(8), past_key_values=cache)


def test_another_model_is_refused_by_a_filled_cache(model):
    other: LlamaForCausalLM = llama(seed=1)
    with specache.SpeCache(model, settings()) as cache:
        specache.prefill(model, prompt(30), cache=cache)
        with pytest.raises(specache.UsageError, match="another model"):
            specache.generate(other, prompt(30), past_key_values=cache, max_new_tokens=4)


@pytest.mark.parametrize("given_cache", [True, False])
def test_nan_in_the_keys_raises_and_stores_nothing(given_cache):
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    cache = specache.SpeCache(broken, settings()) if given_cache else None
    with pytest.raises(specache.NonFiniteError, match="keys of layer 1"):
        specache.generate(broken, prompt(60), config=settings(), past_key_values=cache, max_new_tokens=4)
    if cache is not None:
        assert cache.stats()["total_bytes"] == 0


def test_nan_while_decoding_leaves_the_cache_unchanged(model):
    ids = prompt(60)
    expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    projection = model.model.layers[1].self_attn.k_proj
    with specache.SpeCache(model, settings()) as cache:
        specache.prefill(model, ids, cache=cache)
        broken = projection.register_forward_hook(lambda module, inputs, keys: keys.fill_(torch.nan))
        with pytest.raises(specache.NonFiniteError):
            specache.generate(model, ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
        broken.remove()
        answer = specache.generate(model, ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
        assert torch.equal(answer, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "1, 2, 4"),
        ({"group_size": 0}, "divide"),
        ({"group_size": 48}, "divide"),
        ({"group_size": -16}, "divide"),
        ({"top_k": 0}, "positive"),
        ({"top_k": -1}, "positive"),
        ({"residual": -1}, "0 or more"),
        ({"policy": "psychic"}, "verified"),
        ({"slow_tier": "tape"}, "ram-inplace"),
        ({"hot_set": 1.5}, "fraction"),
        ({"hot_set": -1}, "fraction"),
        ({"prefill_chunk": 0}, "positive"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(specache.ConfigError, match=message):
        specache.SpeCacheConfig(**changes)
