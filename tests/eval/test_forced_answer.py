"""The forced answer: which tokens count, and how a method is compared with the full cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specache.engine.attention_hook import attached
from specache.errors import TaskDataError
from specache.eval import prefilled
from specache.eval.methods.base import SessionStats
from specache.eval.methods.specache import FullMethod, SpeCacheMethod
from specache.eval.methods.streaming_llm import StreamingLLMMethod
from specache.eval.prefilled import Prefilled
from specache.eval.tasks import forced_answer
from specache.eval.tasks.base import Measurement
from specache.eval.tasks.forced_answer import ForcedAnswer, ForcedReference, join_parts, measure_forced, prepare_forced
from tests.cli.tiny_chat import byte_tokenizer
from tests.sessions.sequences import gemma
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
    return ForcedAnswer(out[0, LENGTH:].tolist(), [False] + [True] * (count - 1))


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


@pytest.mark.parametrize(("text", "spans"), [("7", [(0, 1)]), ("nothing", []), ("", [])])
def test_an_answer_in_which_nothing_counts_is_refused(text: str, spans: list[tuple[int, int]]) -> None:
    with pytest.raises(TaskDataError, match="no token of a value"):
        ForcedAnswer.encode(TOKENIZER, text, spans)


def test_the_first_token_does_not_count() -> None:
    assert ForcedAnswer.encode(TOKENIZER, "42", [(0, 2)]).counted == [False, True]


def test_the_full_cache_keeps_all_and_does_not_diverge() -> None:
    answer = greedy_answer(24)
    _, result = measured(FullMethod(), answer)
    assert max(result.values) < 1e-6
    assert result.tokens["right"] == result.tokens["full_right"] == result.tokens["top1"] == [1.0] * 23
    assert result.tokens["nll_delta"] == pytest.approx([0.0] * 23, abs=1e-5)


@pytest.mark.parametrize("make", [llama, gemma])
def test_reading_on_in_chunks_is_decoding_and_changes_nothing(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefilled, "READ_ON", 7)
    answer = prompt(20, seed=5)[0].tolist()
    model = make()
    with torch.no_grad(), attached(model):
        filled = Prefilled(model, prompt(LENGTH)[0].tolist())
        assert filled.reads_on_in_chunks
        chunks: list[tuple[int, torch.Tensor]] = []
        filled.read_on(answer, lambda first, logits: chunks.append((first, logits.clone())))
        decoded = FullMethod().start(filled)
        expected = torch.stack([decoded.feed(token).clone() for token in answer])
        decoded.close()
        filled.close()
    assert [first for first, _ in chunks] == [0, 7, 14]
    torch.testing.assert_close(torch.cat([logits for _, logits in chunks]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_reference_is_decoded_as_methods_are(dtype: torch.dtype) -> None:
    """Else a reference in chunks would diverge from the same cache by its last bits."""
    model = llama().to(dtype)
    answer = ForcedAnswer(prompt(12, seed=5)[0].tolist(), [False] + [True] * 11)
    with torch.no_grad(), attached(model):
        filled = Prefilled(model, prompt(LENGTH)[0].tolist())
        assert not filled.reads_on_in_chunks
        session = FullMethod().start(filled)
        result = measure_forced(prepare_forced(answer, filled), session)
        session.close()
        filled.close()
    assert max(result.values) < 1e-6


def test_a_method_that_drops_the_context_keeps_fewer() -> None:
    answer = greedy_answer(24)
    _, dropping = measured(StreamingLLMMethod(budget=0.05), answer)
    _, fetching = measured(SpeCacheMethod.with_settings({"top_k": 10**6}), answer)
    assert sum(dropping.tokens["right"]) < 23 == sum(fetching.tokens["right"])
    assert sum(dropping.values) > 1000 * sum(fetching.values)


def test_measured_is_what_a_plain_forward_pass_gives_before_the_tokens_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest 2,048 tokens are all 97 here, so this is the divergence over all tokens."""
    answer = ForcedAnswer(prompt(20, seed=5)[0].tolist(), [False] * 10 + [True, False] * 5)
    reference, result = measured(StreamingLLMMethod(budget=0.2), answer)
    _, full = measured(FullMethod(), answer)
    with torch.no_grad():
        logits = llama()(torch.cat([prompt(LENGTH), torch.tensor([answer.tokens])], dim=1)).logits[0]
    expected, targets = logits[LENGTH + 9 : -1 : 2].log_softmax(-1), torch.tensor(answer.tokens[10::2])
    torch.testing.assert_close(reference.log_probs, expected.sort(descending=True).values, atol=1e-4, rtol=1e-4)
    assert reference.token_ids[:, 0].tolist() == expected.argmax(-1).tolist()
    assert torch.isinf(reference.rest).all()
    assert full.tokens["nll"] == pytest.approx((-expected.gather(1, targets[:, None])[:, 0]).tolist(), rel=1e-4)
    assert full.tokens["right"] == result.tokens["full_right"] == (expected.argmax(-1) == targets).float().tolist()
    changes = [mine - theirs for mine, theirs in zip(result.tokens["nll"], full.tokens["nll"], strict=True)]
    assert result.tokens["nll_delta"] == pytest.approx(changes, abs=1e-4)
    monkeypatch.setattr(forced_answer, "KEPT_TOKENS", 8)
    coarse, few = measured(StreamingLLMMethod(budget=0.2), answer)
    assert coarse.token_ids.shape == (5, 8)
    assert all(0 < small <= exact + 1e-6 for small, exact in zip(few.values, result.values, strict=True))


@pytest.mark.parametrize("kept", [2, 3, 50])
def test_the_divergence_is_that_of_the_kept_tokens_and_the_rest(kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    full, other = torch.randn(2, 50, generator=generator).log_softmax(-1)
    best = full.topk(kept)
    rest = torch.tensor(sorted(set(range(50)) - set(best.indices.tolist())), dtype=torch.long)
    reference = ForcedReference(
        ForcedAnswer([1, 2], [False, True]), best.indices[None], best.values[None], full[rest].logsumexp(-1)[None], -full[2:3]
    )
    (value,) = measure_forced(reference, SimpleNamespace(feed=lambda token: other)).values  # type: ignore[arg-type]
    p, q = ([*log[best.indices].exp().tolist(), log[rest].exp().sum().item()] for log in (full, other))
    assert value == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0), rel=1e-4)


def test_tokens_that_both_exclude_add_nothing() -> None:
    """There are fewer tokens than are kept, so that excluded ones are among these."""
    logits, others = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    logits[5] = others[5] = -torch.inf
    reference, best = logits.log_softmax(-1), logits.log_softmax(-1).topk(40)
    rest = torch.tensor([-torch.inf])
    kept = ForcedReference(ForcedAnswer([1, 2], [False, True]), best.indices[None], best.values[None], rest, -reference[2:3])
    session: Any = SimpleNamespace(feed=lambda token: others)
    (value,) = measure_forced(kept, session).values
    finite = [token for token in range(40) if token != 5]
    expected = (reference.exp() * (reference - others.log_softmax(-1)))[finite].sum()
    assert value == pytest.approx(float(expected), rel=1e-5) and value > 0.1


def test_the_token_that_each_ranks_first_is_compared_with_the_answers() -> None:
    answer = ForcedAnswer([0, 1, 2, 3, 4], [False, True, True, False, True])
    ids = torch.tensor([[1, 9], [2, 9], [9, 4]])  # the full cache misses the last token
    reference = ForcedReference(answer, ids, torch.tensor([[-0.1, -3.0]] * 3), torch.full((3,), -4.0), torch.ones(3))
    result = measure_forced(reference, Likely([1, 9, 3, 4], 10))
    assert result.tokens["full_right"] == [1.0, 1.0, 0.0]
    assert result.tokens["right"] == [1.0, 0.0, 1.0]
    assert result.tokens["top1"] == [1.0, 0.0, 0.0]
    assert len(result.values) == 3
    assert result.details == {"first_tokens": {"tokens": 2, "full_right": 1, "kept": 1}}, "tokens 1 and 4 begin values"
