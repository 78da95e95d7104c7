"""The forced answer: which tokens count, and how a method is compared with the full cache."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specache.engine.attention_hook import attached
from specache.errors import TaskDataError
from specache.eval.methods.base import SessionStats
from specache.eval.methods.specache import FullMethod, SpeCacheMethod
from specache.eval.methods.streaming_llm import StreamingLLMMethod
from specache.eval.prefilled import Prefilled
from specache.eval.tasks import forced_answer
from specache.eval.tasks.base import Measurement
from specache.eval.tasks.forced_answer import ForcedAnswer, ForcedReference, join_parts, measure_forced, prepare_forced
from tests.cli.tiny_chat import byte_tokenizer
from tests.tiny import llama, prompt

TOKENIZER = byte_tokenizer()
LENGTH = 300


class Slow:
    """The byte tokenizer without offsets, which fails if it is asked for them."""

    is_fast = False

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        return TOKENIZER(text, add_special_tokens=add_special_tokens)


class Likely:
    """A session whose likeliest tokens are given, one per step."""

    def __init__(self, tokens: list[int], size: int) -> None:
        self._tokens = iter(tokens)
        self._size = size

    def feed(self, token: int) -> torch.Tensor:
        return 5 * torch.nn.functional.one_hot(torch.tensor(next(self._tokens)), self._size).float()

    def stats(self) -> SessionStats:
        return SessionStats(1.0)

    def close(self) -> None:
        pass


def measured(method: Any, answer: ForcedAnswer) -> tuple[ForcedReference, Measurement]:
    model = llama()
    with torch.no_grad(), attached(model):
        filled = Prefilled(model, prompt(LENGTH)[0].tolist())
        reference = prepare_forced(answer, filled)
        session = method.start(filled)
        try:
            return reference, measure_forced(reference, session)
        finally:
            session.close()
            filled.close()


def greedy_answer(count: int) -> ForcedAnswer:
    """Return an answer that the full cache ranks first throughout."""
    model = llama()
    ids = prompt(LENGTH)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=count, do_sample=False)
    return ForcedAnswer(out[0, LENGTH:].tolist(), [True] * count)


def test_parts_are_joined_and_values_found_again() -> None:
    text, spans = join_parts([('{"code": ', False), ("41", True), (', "name": "', False), ("Bo", True), ('"}', False)])
    assert text == '{"code": 41, "name": "Bo"}'
    assert [text[begin:end] for begin, end in spans] == ["41", "Bo"]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Slow()])
def test_tokens_of_values_count_and_keys_and_punctuation_do_not(tokenizer: Any) -> None:
    text, spans = join_parts([("age: ", False), ("41", True), ("; name: ", False), ("Zoë", True), (".", False)])
    answer = ForcedAnswer.encode(tokenizer, text, spans)
    assert TOKENIZER.decode(answer.tokens) == text
    counted = [token for token, counts in zip(answer.tokens, answer.counted, strict=True) if counts]
    assert TOKENIZER.decode(counted) == "41Zoë"


def test_a_token_with_a_single_character_of_a_value_counts() -> None:
    class Pairs:
        is_fast = True

        def __call__(self, text: str, **options: Any) -> Any:
            places = [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
            return {"input_ids": [7] * len(places), "offset_mapping": places}

    assert ForcedAnswer.encode(Pairs(), "a=12,b=3", [(2, 4), (7, 8)]).counted == [False, True, False, True]
    assert ForcedAnswer.encode(Pairs(), "ab=12,", [(3, 5)]).counted == [False, True, True]


def test_an_answer_of_one_token_is_refused() -> None:
    with pytest.raises(TaskDataError, match="at least two tokens"):
        ForcedAnswer.encode(TOKENIZER, "7", [(0, 1)])


def test_the_full_cache_keeps_all_and_does_not_diverge() -> None:
    answer = greedy_answer(24)
    _, result = measured(FullMethod(), answer)
    assert max(result.values) < 1e-6
    assert result.tokens["right"] == result.tokens["kept"] == result.tokens["top1"] == [1.0] * 23


def test_a_method_that_drops_the_context_keeps_fewer() -> None:
    answer = greedy_answer(24)
    _, dropping = measured(StreamingLLMMethod(budget=0.05), answer)
    _, fetching = measured(SpeCacheMethod.with_settings({"top_k": 10**6}), answer)
    assert sum(dropping.tokens["kept"]) < 23 == sum(fetching.tokens["kept"])
    assert sum(dropping.values) > 1000 * sum(fetching.values)


def test_values_are_compared_with_a_plain_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest 2,048 tokens are all 97 here, so this is the divergence itself."""
    answer = ForcedAnswer(prompt(20, seed=5)[0].tolist(), [False] * 10 + [True] * 10)
    reference, result = measured(StreamingLLMMethod(budget=0.2), answer)
    with torch.no_grad():
        logits = llama()(torch.cat([prompt(LENGTH), torch.tensor([answer.tokens])], dim=1)).logits[0, LENGTH:-1]
    expected = logits.log_softmax(-1)
    first = (expected.argmax(-1) == torch.tensor(answer.tokens[1:])).tolist()
    assert result.tokens["right"] == [float(best and counts) for best, counts in zip(first, answer.counted[1:], strict=True)]
    assert reference.token_ids[:, 0].tolist() == expected.argmax(-1).tolist()
    assert torch.isinf(reference.rest).all()
    _, full = measured(FullMethod(), answer)
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(answer.tokens[1:]), reduction="none")
    assert full.tokens["nll"] == pytest.approx(nll.tolist(), rel=1e-4)
    monkeypatch.setattr(forced_answer, "KEPT_TOKENS", 8)
    coarse, few = measured(StreamingLLMMethod(budget=0.2), answer)
    assert coarse.token_ids.shape == (19, 8)
    assert all(0 < small <= exact + 1e-6 for small, exact in zip(few.values, result.values, strict=True))


@pytest.mark.parametrize("kept", [2, 3, 50])
def test_the_divergence_is_that_of_the_kept_tokens_and_the_rest(kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    full, other = torch.randn(2, 50, generator=generator).log_softmax(-1)
    best = full.topk(kept)
    rest = torch.tensor(sorted(set(range(50)) - set(best.indices.tolist())), dtype=torch.long)
    reference = ForcedReference(
        ForcedAnswer([1, 2], [True, True]), best.indices[None], best.values[None], full[rest].logsumexp(-1)[None]
    )
    (value,) = measure_forced(reference, SimpleNamespace(feed=lambda token: other)).values  # type: ignore[arg-type]
    p, q = ([*log[best.indices].exp().tolist(), log[rest].exp().sum().item()] for log in (full, other))
    assert value == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0), rel=1e-4)


def test_only_counted_tokens_that_the_full_cache_ranks_first_can_be_kept() -> None:
    answer = ForcedAnswer([0, 1, 2, 3, 4], [True, True, True, False, True])
    ids = torch.tensor([[1, 9], [2, 9], [3, 9], [9, 4]])  # the full cache misses the last token
    reference = ForcedReference(answer, ids, torch.tensor([[-0.1, -3.0]] * 4), torch.full((4,), -4.0))
    result = measure_forced(reference, Likely([1, 9, 3, 4], 10))
    assert result.tokens["right"] == [1.0, 1.0, 0.0, 0.0]
    assert result.tokens["kept"] == [1.0, 0.0, 0.0, 0.0]
    assert result.tokens["top1"] == [1.0, 0.0, 1.0, 0.0]
