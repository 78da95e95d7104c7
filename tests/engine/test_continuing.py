"""Continuing a cache: with the full text, with only the new tokens, and unclear calls."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, StoppingCriteria

import specache
from specache.engine import prepared_call
from specache.engine.sampling import ClosingStreamer
from tests.engine.test_model_families import LONGROPE
from tests.tiny import llama, prompt, ragged

NEW = 6
ONES = torch.long
PAIRS: dict[str, Any] = {"residual": 16, "group_size": 16, "top_k": 10**6}  # low-bit pairs in a short text, and all of them fetched


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def sliding() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 32}
    tokens = {"eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 4096}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **tokens)).eval()


SETTINGS: dict[str, dict[str, Any]] = {
    "in place": {},
    "verified": {"policy": "verified", "slow_tier": "ram"},
    "full": {"policy": "full"},
    "disk": {"policy": "verified", "slow_tier": "disk"},
}


def opened(model: Any, tmp_path: Path, kind: str = "in place") -> specache.SpeCache:
    """Return a cache that fetches every pair, so that its answers are those of the stock cache."""
    folder = {"slow_dir": str(tmp_path)} if kind == "disk" else {}
    config = specache.SpeCacheConfig(**PAIRS, **SETTINGS[kind], **folder)
    return specache.SpeCache(model, config)


def say(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """Return a greedy answer [B, S + new]."""
    return specache.generate(model, ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False, **more)


def stock(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("which", ["model", "sliding"])
def test_only_new_tokens_with_the_full_mask_continue_like_stock(request, tmp_path, which, kind):
    model = request.getfixturevalue(which)
    with opened(model, tmp_path, kind) as cache:
        text = say(model, cache, prompt(90))
        for turn in range(2):
            question = prompt(9, 10 + turn)
            full = torch.cat([text, question], 1)
            answer = say(model, cache, question, torch.ones_like(full))
            text = torch.cat([full, answer[:, 9:]], 1)
            assert answer[:, :9].equal(question)  # what was passed is in front, as in stock generate
            assert text.equal(stock(model, full))


def test_the_last_generated_token_is_kept_through_stock_generate_too(model, tmp_path):
    with opened(model, tmp_path) as cache:
        text = model.generate(
            prompt(90), custom_generate=specache.decode, past_key_values=cache, max_new_tokens=NEW, do_sample=False
        )
        full = torch.cat([text, prompt(9, 10)], 1)
        answer = model.generate(
            prompt(9, 10),
            attention_mask=torch.ones_like(full),
            custom_generate=specache.decode,
            past_key_values=cache,
            max_new_tokens=NEW,
            do_sample=False,
        )
        assert answer[:, 9:].equal(stock(model, full)[:, full.shape[1] :])


def test_a_mask_of_only_the_stored_tokens_drops_the_pending_token(model, tmp_path):
    with opened(model, tmp_path) as cache:
        text = say(model, cache, prompt(90))
        stored = torch.cat([text[:, :-1], prompt(9, 10)], 1)
        assert cache.get_seq_length() == text.shape[1] - 1
        assert say(model, cache, prompt(9, 10), torch.ones_like(stored))[:, 9:].equal(stock(model, stored)[:, stored.shape[1] :])


def test_a_batch_continues_each_sequence_from_its_own_end(model, tmp_path):
    ids, mask = ragged(60, 35)
    first, second = stock(model, ids, mask)[:, 60:].tolist()
    ends = [next(token for token in second[:-1] if token not in first)]  # the second sequence ends early
    with opened(model, tmp_path) as cache:
        text = say(model, cache, ids, mask, eos_token_id=ends)
        answered = torch.ones_like(text[:, 60:])
        for row in range(2):
            found = (text[row, 60:] == ends[0]).nonzero()
            answered[row, int(found[0]) + 1 if len(found) else NEW :] = 0  # padding behind the end
        assert answered.min() == 0
        question = torch.cat([prompt(7, 10), prompt(7, 11)])
        question[1, :3] = 0
        asked = torch.ones_like(question)
        asked[1, :3] = 0
        whole_mask = torch.cat([mask, answered, asked], 1)
        got = say(model, cache, question, whole_mask)
        for row in range(2):
            alone = torch.cat([text, question], 1)[row][whole_mask[row].bool()][None]
            assert got[row, 7:].tolist() == stock(model, alone)[0, alone.shape[1] :].tolist()


@pytest.mark.parametrize("way", ["generate", "decode", "prefill"])
def test_padding_behind_an_answer_is_never_read_as_text(model, tmp_path, way):
    ids, mask = ragged(60, 35)
    first, second = stock(model, ids, mask)[:, 60:].tolist()
    ends = [next(token for token in second[:-1] if token not in first)]  # the second sequence ends early
    with opened(model, tmp_path) as cache:
        text = say(model, cache, ids, mask, eos_token_id=ends)
        assert text[1, -1] == 0
        full = torch.cat([text, prompt(7, 10).expand(2, 7)], 1)
        with pytest.raises(specache.UsageError, match=r"Sequence 1 of the batch: padding .* only what is new"):
            if way == "generate":
                say(model, cache, full, eos_token_id=ends)
            elif way == "decode":
                settings = {"max_new_tokens": NEW, "eos_token_id": ends, "do_sample": False}
                model.generate(full, custom_generate=specache.decode, past_key_values=cache, **settings)
            else:
                specache.prefill(model, full, cache=cache)
        answered = (text != 0).long()
        asked = torch.cat([answered, torch.ones(2, 7, dtype=ONES)], 1)
        got = say(model, cache, prompt(7, 10).expand(2, 7), asked)  # as the message says
        alone = full[1][asked[1].bool()][None]
        assert got[1, 7:].tolist() == stock(model, alone)[0, alone.shape[1] :].tolist()


def test_a_mask_that_fits_some_sequences_of_a_batch_is_refused(model, tmp_path):
    ids, mask = ragged(60, 35)
    question = torch.cat([prompt(7, 10), prompt(7, 11)])
    with opened(model, tmp_path) as cache:
        text = say(model, cache, ids, mask)
        full = torch.cat([mask, torch.ones(2, NEW + 7, dtype=torch.long)], 1)
        wrong = full.clone()
        wrong[1, 24] = 1  # the mask marks padding of the second prompt as a token
        with pytest.raises(specache.UsageError, match="Sequence 1 of the batch"):
            say(model, cache, question, wrong)
        wrong = full.clone()
        wrong[1, 25] = 0
        with pytest.raises(specache.UsageError, match="some sequences and not of others"):
            say(model, cache, question, wrong)
        assert say(model, cache, question, full).shape == (2, 7 + NEW)
        assert text.shape == (2, 60 + NEW)


@pytest.mark.parametrize("width", [8, 95, 98, 500])
def test_a_mask_of_a_wrong_width_is_refused_with_the_token_counts(model, tmp_path, width):
    with opened(model, tmp_path) as cache:
        specache.prefill(model, prompt(90), cache=cache)
        mask = torch.ones(1, width, dtype=torch.long)
        for call in (say, lambda model, cache, ids, mask: specache.prefill(model, ids, cache=cache, attention_mask=mask)):
            with pytest.raises(specache.UsageError, match=f"{width - 7:,} tokens came before; but the SpeCache holds 90"):
                call(model, cache, prompt(7, 1), mask)
        assert cache.get_seq_length() == 90


def test_a_mask_of_earlier_tokens_is_refused_by_an_empty_cache(model):
    with pytest.raises(specache.UsageError, match="holds 0"):
        specache.generate(model, prompt(7), attention_mask=torch.ones(1, 90, dtype=torch.long), max_new_tokens=2)


@pytest.mark.parametrize("way", ["generate", "decode", "prefill"])
def test_only_new_tokens_without_the_mask_are_refused_and_drop_nothing(model, tmp_path, way):
    with opened(model, tmp_path) as cache:
        text = say(model, cache, prompt(90))
        question = prompt(7, 9)
        with pytest.raises(specache.UsageError, match=r"torch\.cat.*cache\.reset\(\)"):
            if way == "generate":
                say(model, cache, question)
            elif way == "decode":
                model.generate(question, custom_generate=specache.decode, past_key_values=cache, max_new_tokens=2)
            else:
                specache.prefill(model, question, cache=cache)
        full = torch.cat([text, question], 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert say(model, cache, full).equal(stock(model, full))


def test_only_new_tokens_after_a_bos_token_are_refused_too(model, tmp_path):
    document, question = prompt(90), prompt(7, 9)
    document[0, 0] = question[0, 0] = 1  # a BOS token
    with opened(model, tmp_path) as cache:
        specache.prefill(model, document, cache=cache)
        with pytest.raises(specache.UsageError, match="begin with nothing"):
            say(model, cache, question)


def test_refused_num_return_sequences_leave_the_cache_unchanged(model, tmp_path):
    with opened(model, tmp_path) as cache:
        specache.prefill(model, prompt(90), cache=cache)
        with pytest.raises(specache.UsageError, match="begin with nothing"):
            specache.generate(model, prompt(7, 9), past_key_values=cache, max_new_tokens=2, do_sample=True, num_return_sequences=3)
        assert [sequence.length for sequence in cache.sequences] == [90]


@pytest.mark.parametrize(("answers", "tokens"), [(9, 2), (3, 1500)], ids=["no room for copies", "none for the answers"])
def test_a_batch_that_exceeds_fast_memory_leaves_the_cache_unchanged(model, answers, tokens):
    settings = {"max_new_tokens": tokens, "do_sample": True, "num_return_sequences": answers}
    with specache.SpeCache(model, specache.SpeCacheConfig(fast_memory=1_110_000, residual=64, top_k=64)) as cache:
        specache.prefill(model, prompt(90), cache=cache)
        held, longer = cache.resources.budget.used, torch.cat([prompt(90), prompt(300, 1)], 1)
        with pytest.raises(specache.FastMemoryError):
            specache.generate(model, longer, past_key_values=cache, **settings)
        assert [sequence.length for sequence in cache.sequences] == [90]
        assert cache.resources.budget.used == held
        assert torch.equal(say(model, cache, longer), stock(model, longer))


def test_a_short_text_that_shares_the_templates_first_tokens_warns(model, tmp_path):
    with opened(model, tmp_path) as cache:
        first = say(model, cache, torch.cat([prompt(3), prompt(20, 1)], 1))
        new = torch.cat([prompt(3), prompt(9, 2)], 1)
        with pytest.warns(UserWarning, match="from token 3 on: .*are forgotten.* If only what is new was passed"):
            say(model, cache, new)
        assert first.shape == (1, 23 + NEW)


def test_reset_lets_another_text_begin(model, tmp_path):
    with opened(model, tmp_path) as cache:
        say(model, cache, prompt(90))
        cache.reset()
        assert (cache.get_seq_length(), cache.stats()["total_bytes"], cache.finish_reasons) == (0, 0, [])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert say(model, cache, prompt(20, 5)).equal(stock(model, prompt(20, 5)))
        cache.reset()
        ids, mask = ragged(30, 20)
        assert say(model, cache, ids, mask).equal(stock(model, ids, mask))


def test_another_batch_in_the_same_cache_is_refused(model, tmp_path):
    ids, mask = ragged(30, 20)
    with opened(model, tmp_path) as cache:
        say(model, cache, ids, mask)
        with pytest.raises(specache.UsageError, match=r"2 sequences .* 3 prompts.*reset"):
            say(model, cache, *ragged(30, 20, 10))


def test_an_edit_far_back_warns_with_position_and_token_count(model, tmp_path):
    edited = torch.cat([prompt(20), prompt(75, 3)], 1)
    with opened(model, tmp_path) as cache:
        say(model, cache, prompt(90))
        with pytest.warns(UserWarning, match=r"from token 20 on: of 95 stored tokens 75 are forgotten, and 75 are read"):
            assert say(model, cache, edited).equal(stock(model, edited))


@pytest.mark.parametrize(("stored", "new"), [(20, 18), (20, 60), (1, 3), (1, 40), (2, 9)])
def test_another_text_warns_however_short_both_are(model, tmp_path, stored, new):
    """Also where little more than an answer was stored: it may be only what is new."""
    with opened(model, tmp_path) as cache:
        say(model, cache, prompt(stored))
        with pytest.warns(UserWarning, match="from token 0 on"):
            say(model, cache, prompt(new, 3))


SILENT = {
    "the same again": lambda text: text[:, :90],
    "a beginning of it": lambda text: text[:, :40],
    "the last words changed": lambda text: torch.cat([text[:, :80], prompt(20, 3)], 1),
    "another answer put in": lambda text: torch.cat([text[:, :90], prompt(200, 3)], 1),
}


@pytest.mark.parametrize("case", SILENT)
def test_asking_again_and_small_edits_do_not_warn(model, tmp_path, case):
    with opened(model, tmp_path) as cache:
        text = say(model, cache, prompt(90))
        ids = SILENT[case](text)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert say(model, cache, ids).equal(stock(model, ids))


def test_windows_without_a_checkpoint_warn_how_much_is_prefilled_again(sliding, tmp_path):
    ids = prompt(1300)
    with opened(sliding, tmp_path) as cache:
        specache.prefill(sliding, ids, cache=cache)
        cache.sequences[0].checkpoints.forget_after(0)  # as if memory did not suffice for checkpoints
        edited = torch.cat([ids[:, :1250], prompt(9, 3)], 1)
        with pytest.warns(UserWarning, match=r"1,250 stored tokens .* sliding windows"):
            assert say(sliding, cache, edited).equal(stock(sliding, edited))


def test_the_pending_token_is_forked_and_dropped_by_truncation(model, tmp_path):
    with opened(model, tmp_path) as cache:
        full = torch.cat([say(model, cache, prompt(90)), prompt(9, 10)], 1)
        with cache.fork() as fork:
            answer = say(model, fork, prompt(9, 10), torch.ones_like(full))
            assert answer[:, 9:].equal(stock(model, full)[:, full.shape[1] :])
        cache.sequences[0].truncate(95)
        assert cache.sequences[0].pending_token is not None
        cache.sequences[0].truncate(94)
        mask = torch.ones(1, 94 + 1 + 9, dtype=torch.long)
        with pytest.raises(specache.UsageError, match="holds 94"):
            say(model, cache, prompt(9, 10), mask)


def test_a_session_saves_the_pending_token_and_the_prompt_length(model, tmp_path):
    config = specache.SpeCacheConfig(**PAIRS)
    with specache.Session("one", model, config, folder=tmp_path) as session:
        full = torch.cat([say(model, session.cache, prompt(90)), prompt(9, 10)], 1)
        session.save()
    with specache.Session("one", model, config, folder=tmp_path) as session:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answer = say(model, session.cache, prompt(9, 10), torch.ones_like(full))
        assert answer[:, 9:].equal(stock(model, full)[:, full.shape[1] :])
        session.cache.reset()
        assert session.token_ids == []
        assert say(model, session.cache, prompt(20, 5)).equal(stock(model, prompt(20, 5)))


class Interrupting:
    """A streamer that raises after some tokens."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens + 1  # the prompt comes first

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_an_interrupted_answer_continues_with_only_new_tokens(model, tmp_path, tokens):
    with opened(model, tmp_path) as cache:
        with pytest.raises(KeyboardInterrupt):
            say(model, cache, prompt(90), streamer=Interrupting(tokens))
        text = torch.cat([stock(model, prompt(90))[:, : 90 + tokens], prompt(9, 10)], 1)
        answer = say(model, cache, prompt(9, 10), torch.ones_like(text))
        assert answer[:, 9:].equal(stock(model, text)[:, text.shape[1] :])


def test_a_failed_prefill_keeps_the_pending_token(model, tmp_path, monkeypatch):
    with opened(model, tmp_path) as cache:
        full = torch.cat([say(model, cache, prompt(90)), prompt(9, 10)], 1)
        layer = model.model.layers[2].self_attn

        def failing(*args: Any, **kwargs: Any) -> Any:
            raise MemoryError

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(layer, "forward", failing)
            say(model, cache, prompt(9, 10), torch.ones_like(full))
        answer = say(model, cache, prompt(9, 10), torch.ones_like(full))
        assert answer[:, 9:].equal(stock(model, full)[:, full.shape[1] :])


def test_prefill_appends_new_tokens_under_the_full_mask(model, tmp_path):
    text = prompt(120)
    with opened(model, tmp_path) as cache:
        specache.prefill(model, text[:, :80], cache=cache)
        specache.prefill(model, text[:, 80:], cache=cache, attention_mask=torch.ones_like(text))
        assert cache.sequences[0].token_ids == text[0].tolist()


def test_num_return_sequences_continue_one_text(model, tmp_path):
    with opened(model, tmp_path) as cache:
        text = say(model, cache, prompt(90))
        full = torch.cat([text, prompt(9, 10)], 1)
        settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": NEW}
        torch.manual_seed(3)
        expected = model.generate(full, attention_mask=torch.ones_like(full), **settings)
        torch.manual_seed(3)
        got = specache.generate(model, prompt(9, 10), attention_mask=torch.ones_like(full), past_key_values=cache, **settings)
        assert got[:, 9:].equal(expected[:, full.shape[1] :])


class FailingAtTheThird(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] == 102:
            raise RuntimeError
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("where", ["room", "streamer", "reading"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_num_return_sequences_that_fail_before_a_token_remove_their_forks(model, tmp_path, monkeypatch, where, kind):
    full = torch.cat([prompt(90), prompt(9, 10)], 1)
    sampled = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3}

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no room")

    with opened(model, tmp_path, kind) as cache:
        specache.prefill(model, prompt(90), cache=cache)
        with monkeypatch.context() as patched, pytest.raises(RuntimeError):
            if where == "room":
                patched.setattr(prepared_call, "check_room", failing)
            if where == "reading":
                patched.setattr(model.model.layers[2].self_attn, "forward", failing)
            if where == "streamer":
                patched.setattr(ClosingStreamer, "put", failing)
            specache.generate(model, full, past_key_values=cache, streamer=Interrupting(99), **sampled)
        assert [sequence.length for sequence in cache.sequences] == [90]
        assert cache.context.living_sequences == 1
        assert say(model, cache, full).equal(stock(model, full))


def test_num_return_sequences_that_fail_after_a_token_keep_their_forks(model, tmp_path):
    with opened(model, tmp_path) as cache:
        specache.prefill(model, prompt(90), cache=cache)
        full = torch.cat([prompt(90), prompt(9, 10)], 1)
        sampled = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3}
        with pytest.raises(RuntimeError):
            specache.generate(model, full, past_key_values=cache, stopping_criteria=[FailingAtTheThird()], **sampled)
        assert [sequence.length for sequence in cache.sequences] == [99 + 2] * 3


def test_a_text_that_grows_past_a_rope_switch_warns_how_much_is_prefilled_again(tmp_path):
    longrope = {**LONGROPE, "original_max_position_embeddings": 1300}
    model = llama(max_position_embeddings=4096, rope_parameters=longrope)
    text = torch.cat([prompt(1280), prompt(40, 1)], 1)
    with opened(model, tmp_path) as cache:
        specache.prefill(model, text[:, :1280], cache=cache)
        with pytest.warns(UserWarning, match=r"1,280 stored tokens are read again too: .* more than 1,300 tokens"):
            say(model, cache, text)


def test_prompt_tokens_are_kept_if_rope_switches_in_an_answer(tmp_path):
    model = llama(max_position_embeddings=4096, rope_parameters=LONGROPE)
    length = LONGROPE["original_max_position_embeddings"] - 2
    with opened(model, tmp_path) as cache:
        say(model, cache, prompt(length))
        assert cache.sequences[0].prompt_tokens == length


LOOKING_BACK = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "min_length": {"min_length": 100, "eos_token_id": list(range(2, 60))},
    "max_length": {"max_length": 100, "max_new_tokens": None},
    "a function of the text": {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids.sum()) % 97]},
}


@pytest.mark.parametrize("settings", LOOKING_BACK.values(), ids=LOOKING_BACK)
def test_settings_that_look_back_see_the_stored_text_when_only_new_tokens_are_passed(model, settings):
    settings = {"max_new_tokens": 12, "do_sample": False, **settings}
    cache = specache.SpeCache(model, specache.SpeCacheConfig(top_k=10**6))
    text = torch.cat([say(model, cache, prompt(80)), prompt(7, 3)], 1)
    expected = model.generate(text, attention_mask=torch.ones_like(text), **settings)
    got = specache.generate(model, text[:, -7:], attention_mask=torch.ones_like(text), past_key_values=cache, **settings)
    assert got.tolist() == expected[:, -got.shape[1] :].tolist()
    assert got.shape[1] - 7 == expected.shape[1] - text.shape[1]


def test_a_streamer_and_a_dict_of_new_tokens_begin_with_what_was_passed(model):
    class Seen:
        def __init__(self) -> None:
            self.tokens: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.tokens.append(value.tolist())

        def end(self) -> None:
            pass

    cache, seen = specache.SpeCache(model, specache.SpeCacheConfig(top_k=10**6)), Seen()
    text = torch.cat([say(model, cache, prompt(80)), prompt(7, 3)], 1)
    more = {"streamer": seen, "return_dict_in_generate": True}
    output = say(model, cache, text[:, -7:], torch.ones_like(text), **more)
    assert seen.tokens[0] == text[:, -7:].tolist()
    assert output.sequences.tolist() == stock(model, text)[:, text.shape[1] - 7 :].tolist()


def test_stock_generate_warns_of_a_penalty_that_does_not_see_the_stored_text(model):
    cache = specache.SpeCache(model, specache.SpeCacheConfig(top_k=10**6))
    text = torch.cat([say(model, cache, prompt(80)), prompt(7, 3)], 1)
    more = {"attention_mask": torch.ones_like(text), "past_key_values": cache, "custom_generate": specache.decode}
    with pytest.warns(UserWarning, match="RepetitionPenaltyLogitsProcessor see only the 7 tokens"):
        model.generate(text[:, -7:], repetition_penalty=1.5, max_new_tokens=2, **more)


def test_a_penalty_sees_each_stored_text_that_one_row_of_new_tokens_continues(model):
    cache = specache.SpeCache(model, specache.SpeCacheConfig(top_k=10**6))
    sampled = {"do_sample": True, "max_new_tokens": 5, "repetition_penalty": 1.7}
    torch.manual_seed(1)
    answered = specache.generate(model, prompt(80), past_key_values=cache, num_return_sequences=3, **sampled)
    text = torch.cat([answered, prompt(6, 4).expand(3, -1)], 1)
    torch.manual_seed(2)
    expected = model.generate(text, attention_mask=torch.ones_like(text), **sampled)
    more = {"attention_mask": torch.ones_like(text[:1]), "past_key_values": cache, "num_return_sequences": 3}
    torch.manual_seed(2)
    assert specache.generate(model, prompt(6, 4), **more, **sampled).tolist() == expected[:, answered.shape[1] :].tolist()
