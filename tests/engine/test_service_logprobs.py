"""Log-probabilities that a service reports, against the stock model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import specache
from specache.engine import room
from specache.engine.events import NewToken, PromptLogprobs, TokenLogprob
from specache.engine.prefix_store import PrefixStore
from tests.engine.serving import ask, service_of, settings
from tests.tiny import llama, prompt

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def stock(model: Any, tokens: list[int]) -> Tensor:
    """Log-probabilities [S, V] of the token after each."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), dim=-1)


def equal(found: Any, token: int, wanted: Tensor, top: int) -> None:
    assert found.token_id == token
    assert found.logprob == pytest.approx(float(wanted[token]), abs=TOLERANCE)
    assert len(found.top) == top
    values = [value for _, value in found.top]
    assert values == pytest.approx(wanted.topk(top).values.tolist(), abs=TOLERANCE) and values == sorted(values, reverse=True)
    assert all(value == pytest.approx(float(wanted[one]), abs=TOLERANCE) for one, value in found.top)


@pytest.mark.parametrize("top", [0, 1, 5])
def test_new_tokens_carry_the_log_probabilities_of_the_models_own_logits(model, top):
    """Processors change what is chosen, not what is reported."""
    with service_of(model, settings(policy="full")) as service:
        client = ask(service, model, prompt(70), job={"top_logprobs": top}, repetition_penalty=1.8, max_new_tokens=10)
        client.end()
    tokens = client.tokens()
    wanted = stock(model, [*prompt(70)[0].tolist(), *tokens])[69:]
    for event, token, row in zip(client.of(NewToken), tokens, wanted, strict=False):
        equal(event, token, row, top)
    assert any(event.logprob < float(row.max()) - 0.1 for event, row in zip(client.of(NewToken), wanted, strict=False))


def test_every_row_of_several_answers_has_its_own(model):
    options = {"do_sample": True, "temperature": 2.0, "top_k": 0, "num_return_sequences": 3, "max_new_tokens": 6}
    with service_of(model, settings(policy="full")) as service:
        client = ask(service, model, prompt(50), job={"top_logprobs": 2}, seed=3, **options)
        client.end()
    for row in range(3):
        wanted = stock(model, [*prompt(50)[0].tolist(), *client.tokens(row)])[49:]
        for event, logprobs in zip([event for event in client.of(NewToken) if event.row == row], wanted, strict=False):
            equal(event, event.token_id, logprobs, 2)


def test_over_low_bit_pairs_they_are_those_of_the_logits_that_were_sampled(model):
    output = specache.generate(
        model, prompt(90), config=settings(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with service_of(model) as service:
        client = ask(service, model, prompt(90), job={"top_logprobs": 3})
        client.end()
    for event, logits in zip(client.of(NewToken), output.logits, strict=True):
        equal(event, int(logits.argmax()), torch.log_softmax(logits[0], dim=-1), 3)


@pytest.mark.parametrize("most_bytes", [64 << 20, 97 * 12 * 7])
def test_echo_gives_every_prompt_tokens_log_probability_chunk_by_chunk(model, monkeypatch, most_bytes):
    monkeypatch.setattr(room, "LOGIT_BYTES", most_bytes)
    ids = prompt(75)
    with service_of(model) as service:
        client = ask(service, model, ids, job={"prompt_logprobs": 4}, max_new_tokens=1)
        client.end()
    parts: list[PromptLogprobs] = client.of(PromptLogprobs)
    longest = 32 if most_bytes == 64 << 20 else 7
    assert [part.start for part in parts] == [0, *range(longest + 1, 75, longest)]
    found = [token for part in parts for token in part.tokens]
    assert found[0] == TokenLogprob(int(ids[0, 0]), None)
    wanted = stock(model, ids[0].tolist())
    assert len(found) == 75
    for index, token in enumerate(found[1:], start=1):
        equal(token, int(ids[0, index]), wanted[index - 1], 4)
    assert client.tokens() == [int(wanted[-1].argmax())]


def test_echo_of_a_prompt_of_one_token(model):
    with service_of(model) as service:
        client = ask(service, model, prompt(1), job={"prompt_logprobs": 0, "top_logprobs": 0}, max_new_tokens=1)
        client.end()
    assert [part.tokens for part in client.of(PromptLogprobs)] == [(TokenLogprob(int(prompt(1)[0, 0]), None),)]
    assert client.of(NewToken)[0].logprob is not None


def test_echo_reads_a_stored_prompt_again_and_leaves_it_stored(model):
    store = PrefixStore(model, settings())
    with service_of(model, prefixes=store) as service:
        ask(service, model, prompt(120)).end()
        echo = ask(service, model, prompt(120), job={"prompt_logprobs": 0}, max_new_tokens=1)
        echo.end()
        assert echo.cached == 0
        assert len([token for part in echo.of(PromptLogprobs) for token in part.tokens]) == 120
        again = ask(service, model, prompt(120))
        again.end()
        assert again.cached == 119


def test_the_logits_of_a_prompt_count_in_fast_memory(model, monkeypatch):
    """They are planned for beside everything else, so the budget holds."""
    peaks = []
    for job in ({}, {"prompt_logprobs": 1}):
        with service_of(model, settings(fast_memory=100_000_000)) as service:
            ask(service, model, prompt(90), job=job, max_new_tokens=1).end()
            peaks.append(service.status().fast_peak_bytes)
    assert peaks[1] >= peaks[0] + 31 * 97 * 12
    with service_of(model, settings(fast_memory=(peaks[0] + peaks[1]) // 2)) as service:
        ask(service, model, prompt(90), max_new_tokens=1).end()
        with pytest.raises(specache.FastMemoryError):
            ask(service, model, prompt(90), job={"prompt_logprobs": 1}, max_new_tokens=1)
