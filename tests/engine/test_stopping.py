"""Stopping as in stock: stop strings, several end tokens, batches that end unevenly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specache
from specache.cli.models import Dtype, LoadedModel, load
from specache.cli.prompts import pad_left
from specache.templates.template import ChatTemplate
from tests.tiny import llama, prompt

NEW = 32
EVERYTHING = 10**6
POLICIES = ("full", "verified", "on-demand")


def settings(policy: str = "verified") -> specache.SpeCacheConfig:
    return specache.SpeCacheConfig(group_size=16, residual=16, slow_tier="ram", policy=policy, top_k=EVERYTHING)


def ours(model: Any, ids: torch.Tensor, policy: str = "verified", **arguments: Any) -> tuple[torch.Tensor, list[str | None]]:
    """Return tokens [B, S + new] and each sequence's finish reason."""
    with specache.SpeCache(model, settings(policy)) as cache:
        tokens = specache.generate(model, ids, past_key_values=cache, **arguments)
        return tokens, cache.finish_reasons


@pytest.fixture(scope="module")
def tiny(tiny_folder) -> LoadedModel:
    """Every byte is a token, so that a stop string is always many tokens."""
    return load(str(tiny_folder), dtype=Dtype.FLOAT32)


@pytest.fixture(scope="module", params=["bytes", "smollm2"])
def real(request: pytest.FixtureRequest) -> LoadedModel:
    """A model with a byte tokenizer, and one whose stop strings begin inside a token."""
    return request.getfixturevalue("tiny" if request.param == "bytes" else "demo_model")


@pytest.fixture(scope="module")
def asked(real: LoadedModel) -> tuple[torch.Tensor, str]:
    return stock_answer(real, "Why is the sky blue?")


@pytest.fixture(scope="module")
def stopped(real: LoadedModel, asked: tuple[torch.Tensor, str]) -> tuple[dict[str, Any], torch.Tensor]:
    """Return arguments with stop strings, of which the second occurs, and stock's tokens."""
    ids, answer = asked
    arguments = {**_unstopped(ids), "stop_strings": ["never said", ascii_piece(answer, 8)], "tokenizer": real.tokenizer}
    return arguments, real.model.generate(ids, **arguments)


def stock_answer(loaded: LoadedModel, text: str) -> tuple[torch.Tensor, str]:
    """Return a prompt, and stock generate's answer without an end token."""
    template = ChatTemplate(loaded.tokenizer)
    ids = torch.tensor([template.encode(template.ask(text))])
    return ids, _decode(loaded, loaded.model.generate(ids, **_unstopped(ids), eos_token_id=[]), ids)


def _unstopped(ids: torch.Tensor) -> dict[str, Any]:
    return {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW,
        "do_sample": False,
        "repetition_penalty": 1.3,
        "pad_token_id": 0,
    }


def _decode(loaded: LoadedModel, tokens: torch.Tensor, ids: torch.Tensor) -> str:
    return loaded.tokenizer.decode(tokens[0, ids.shape[1] :])


def ascii_piece(text: str, start: int) -> str:
    """Return three consecutive printable characters of `text`, from about `start` on."""
    pieces = (text[i : i + 3] for i in range(start, len(text) - 3))
    return next(piece for piece in pieces if piece.isascii() and piece.isprintable())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stop_string_ends_the_answer_where_stock_ends_it(real, asked, stopped, policy):
    (ids, _), (arguments, expected) = asked, stopped
    tokens, reasons = ours(real.model, ids, policy, **arguments)
    assert torch.equal(tokens, expected)
    assert reasons == ["stop"]
    assert arguments["stop_strings"][1] in _decode(real, tokens, ids)
    assert tokens.shape[1] < ids.shape[1] + NEW


def test_a_stop_string_that_never_occurs_changes_nothing(real, asked):
    ids, answer = asked
    arguments = {**_unstopped(ids), "stop_strings": "\u2603 never", "tokenizer": real.tokenizer, "eos_token_id": []}
    tokens, reasons = ours(real.model, ids, **arguments)
    assert _decode(real, tokens, ids) == answer
    assert reasons == ["length"]


@pytest.mark.parametrize("ends", ["end token", "no end token"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_stop_string_ends_one_of_two_sequences(tiny, monkeypatch, policy, ends):
    """Without an end token stock pads nothing: a stopped sequence runs on with the others."""
    ids, answer = stock_answer(tiny, "Why is the sky blue?")
    template = ChatTemplate(tiny.tokenizer)
    rows, mask = pad_left([ids[0].tolist(), template.encode(template.ask("Who?"))], pad_id=0)
    arguments = {
        **_unstopped(rows),
        "attention_mask": mask,
        "stop_strings": [ascii_piece(answer, 4)],
        "tokenizer": tiny.tokenizer,
    }
    if ends == "no end token":
        monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", None)
    tokens, reasons = ours(tiny.model, rows, policy, **arguments)
    assert torch.equal(tokens, tiny.model.generate(rows, **arguments))
    assert reasons[0] == "stop"


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return pad_left([prompt(length, seed=length)[0].tolist() for length in (80, 50, 31)], pad_id=0)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_any_of_several_end_tokens_ends_a_sequence_as_in_stock(policy, do_sample):
    model = llama()
    ids, mask = batch()
    arguments = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": do_sample, "eos_token_id": list(range(2, 9))}
    torch.manual_seed(3)
    expected = model.generate(ids, **arguments)
    torch.manual_seed(3)
    tokens, reasons = ours(model, ids, policy, **arguments)
    assert torch.equal(tokens, expected)
    for row, reason in zip(tokens[:, ids.shape[1] :].tolist(), reasons, strict=True):
        assert reason == ("stop" if any(2 <= token < 9 for token in row) else "length")
    assert "stop" in reasons


def new_tokens_until_end(row: list[int], ends: range) -> int:
    """Return how many tokens a sequence has, its end token included."""
    return next((place + 1 for place, token in enumerate(row) if token in ends), len(row))


@pytest.mark.parametrize("policy", POLICIES)
def test_scores_and_logits_of_an_uneven_batch_equal_stocks_up_to_each_end(policy):
    """Stock feeds padding to a finished sequence. We do not run it, and repeat its last scores."""
    model, ends = llama(), range(2, 9)
    ids, mask = batch()
    output = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    arguments = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.2, **output}
    expected = model.generate(ids, eos_token_id=list(ends), **arguments)
    got = specache.generate(model, ids, config=settings(policy), eos_token_id=list(ends), **arguments)
    got.past_key_values.close()
    assert torch.equal(got.sequences, expected.sequences)
    lengths = [new_tokens_until_end(row, ends) for row in got.sequences[:, ids.shape[1] :].tolist()]
    assert min(lengths) < max(lengths)
    for ours_, stocks in ((got.scores, expected.scores), (got.logits, expected.logits)):
        assert [each.shape for each in ours_] == [each.shape for each in stocks]
        for row, length in enumerate(lengths):
            mine, theirs = (torch.stack([step[row] for step in steps[:length]]) for steps in (ours_, stocks))
            assert (mine - theirs).abs().max() < 1e-4
    for row, length in enumerate(lengths):
        for step in range(length, max(lengths)):
            assert torch.equal(got.logits[step][row], got.logits[length - 1][row])
