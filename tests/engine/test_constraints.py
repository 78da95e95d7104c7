"""A constraint holds for real and for draft tokens, and draft tokens change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import specache
from specache import reference
from specache.engine.constraints import ConstrainedTokens, ConstraintsComplete
from specache.engine.draft_tokens import DraftProcessors
from specache.errors import GrammarError
from tests.tiny import FETCHING, llama, prompt

NEW, LENGTH, VOCABULARY = 30, 200, 97


class EverySeventh:
    """Allows the tokens whose distance to the newest one leaves a rest by its place, modulo 7."""

    def forbidden(self, answer: Sequence[int]) -> Tensor | None:
        newest = answer[-1] if answer else 0
        return (torch.arange(VOCABULARY) - newest) % 7 != len(answer) % 3

    def is_complete(self, answer: Sequence[int]) -> bool:
        return False


class Unmarked(LogitsProcessor):
    """The same constraint as a processor that does not say what it depends on."""

    def __init__(self) -> None:
        self._constrained = constrained()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._constrained(input_ids, scores)


def constrained(rows: int = 1) -> ConstrainedTokens:
    return ConstrainedTokens([EverySeventh() for _ in range(rows)], LENGTH)


def settings(**changes: Any) -> specache.SpeCacheConfig:
    return specache.SpeCacheConfig(**{"group_size": 16, "residual": 16, "top_k": 10**6, "slow_tier": "ram", **changes})


def run(model: Any, config: specache.SpeCacheConfig, processor: LogitsProcessor) -> tuple[list[int], dict[str, Any]]:
    output = specache.generate(
        model,
        prompt(LENGTH),
        config=config,
        max_new_tokens=NEW,
        do_sample=False,
        logits_processor=LogitsProcessorList([processor]),
        return_dict_in_generate=True,
    )
    with output.past_key_values as cache:
        return output.sequences[0, LENGTH:].tolist(), cache.stats()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def expected(model: Any) -> list[int]:
    """The answer of the stock cache."""
    processors = LogitsProcessorList([constrained()])
    output = model.generate(prompt(LENGTH), max_new_tokens=NEW, do_sample=False, logits_processor=processors)
    tokens: list[int] = output[0, LENGTH:].tolist()
    return tokens


@pytest.mark.parametrize("policy", [*FETCHING, "full"])
def test_every_policy_that_fetches_all_pairs_gives_the_stock_answer(model, expected, policy):
    assert run(model, settings(policy=policy), constrained())[0] == expected


@pytest.mark.usefixtures("torch_kernels")
@pytest.mark.parametrize("policy", [policy for policy in (*FETCHING, "none") if policy != "speculative"])  # which needs its drafts
def test_every_policy_gives_the_likeliest_allowed_token_of_the_reference(model, policy):
    config = settings(policy=policy, top_k=8, bits=2, prefill_chunk=4096)
    tokens, _ = run(model, config, constrained())
    logits = reference.generate(model, prompt(LENGTH), config, NEW, forced_tokens=tokens).logits
    for place, token in enumerate(tokens):
        forbidden = EverySeventh().forbidden(tokens[:place])
        assert token == logits[place].masked_fill(forbidden, -torch.inf).argmax()


@pytest.mark.parametrize(("policy", "residual"), [("verified", 16), ("speculative", 256)])
def test_draft_tokens_obey_so_that_exact_attention_makes_every_one_right(model, expected, policy, residual):
    config = settings(policy=policy, residual=residual)
    assert run(model, config, constrained())[1]["guess_rate"] == 1.0
    tokens, statistics = run(model, config, Unmarked())
    assert tokens == expected
    assert statistics["guess_rate"] < 0.5


def test_rows_have_constraints_of_their_own():
    scores = torch.zeros(2, VOCABULARY)
    ids = torch.cat([prompt(LENGTH), prompt(LENGTH)])
    ids = torch.cat([ids, torch.tensor([[5], [6]])], dim=1)
    allowed = [row.isfinite().nonzero()[:, 0].tolist() for row in constrained(2)(ids, scores)]
    assert allowed == [list(range(6, VOCABULARY, 7)), list(range(0, VOCABULARY, 7))]


def test_a_shortest_length_cannot_leave_nothing():
    class OnlyTheEnd(EverySeventh):
        def forbidden(self, answer: Sequence[int]) -> Tensor:
            return torch.arange(VOCABULARY) != 3

    scores = torch.randn(1, VOCABULARY)
    scores[0, 3] = -torch.inf  # `min_new_tokens`
    assert ConstrainedTokens([OnlyTheEnd()], LENGTH)(prompt(LENGTH), scores).argmax() == 3


def test_an_answer_ends_where_its_constraint_is_complete(model):
    class Complete(EverySeventh):
        def is_complete(self, answer: Sequence[int]) -> bool:
            return len(answer) == 5

    tokens = ConstrainedTokens([Complete()], LENGTH)
    config = settings(policy="verified")
    processors, criteria = LogitsProcessorList([tokens]), [ConstraintsComplete(tokens)]
    output = specache.generate(
        model,
        prompt(LENGTH),
        config=config,
        max_new_tokens=NEW,
        do_sample=False,
        logits_processor=processors,
        stopping_criteria=criteria,
    )
    assert output.shape[1] == LENGTH + 5


def test_an_error_about_a_draft_token_is_no_error_of_the_answer():
    class TooComplex(EverySeventh):
        def forbidden(self, answer: Sequence[int]) -> Tensor:
            raise GrammarError("too complex")

    tokens = ConstrainedTokens([TooComplex()], LENGTH)
    scores = torch.randn(1, VOCABULARY)
    with pytest.raises(GrammarError):
        tokens(prompt(LENGTH), scores)
    assert torch.equal(DraftProcessors(LogitsProcessorList([tokens]))(prompt(LENGTH), scores), scores)
