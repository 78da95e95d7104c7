"""The distribution tasks on a tiny model: what they compare, and that they detect a bad cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from specache.cli.models import Dtype, load
from specache.engine.attention_hook import attached
from specache.errors import ConfigError, TaskDataError
from specache.eval.methods.specache import FullMethod, KiviMethod, SpeCacheMethod
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Item, Measurement, TaskModel
from specache.eval.tasks.divergence import divergence
from specache.eval.tasks.documents import excerpts
from specache.eval.tasks.fidelity import Fidelity
from specache.eval.tasks.perplexity import PAPER_TOKENS, Perplexity
from tests.cli.tiny_chat import byte_tokenizer

LENGTHS, NEW = (300, 420), 12


@pytest.fixture(scope="module")
def model(tiny_folder) -> TaskModel:
    loaded = load(str(tiny_folder), dtype=Dtype.FLOAT32)
    return TaskModel(loaded.model, loaded.tokenizer, loaded.name)


def measured(task: Any, model: TaskModel, item: Item, method: Any) -> Measurement:
    prompt = Prefilled(model.model, item.prompt)
    with torch.no_grad(), attached(model.model):
        prepared = task.prepare(model, item, prompt)
        session = method.start(prompt)
        try:
            return task.measure(model, prepared, session)
        finally:
            session.close()
            prompt.close()


def test_items_depend_on_the_seed(model):
    task = Fidelity(lengths=LENGTHS, new=NEW)
    items = list(task.items(model))
    assert [item.id for item in items] == ["text/0", "answer/0", "text/1", "answer/1"]
    assert [item.group for item in items] == ["fidelity/text", "fidelity/answer"] * 2
    assert items == list(task.items(model))
    assert items[0].prompt != next(iter(Fidelity(lengths=LENGTHS, new=NEW, seed=1).items(model))).prompt


def test_the_text_and_the_question_share_the_documents_prefill(model):
    text, answer = list(Fidelity(lengths=(300,), new=NEW).items(model))
    assert text.shared == answer.shared >= 299
    assert text.prompt[: text.shared] == answer.prompt[: text.shared]
    assert text.prompt[-1] == answer.prompt[len(text.prompt) - 1]


@pytest.mark.parametrize("kind", ["text", "answer"])
def test_the_full_cache_has_no_divergence_from_itself(model, kind):
    task = Fidelity(lengths=(300,), new=NEW, along=(kind,))
    (item,) = task.items(model)
    result = measured(task, model, item, FullMethod())
    assert len(result.values) == len(result.tokens["top1"]) == len(result.tokens["nll"]) == NEW
    assert max(result.values) < 1e-6
    assert set(result.tokens["top1"]) == {1.0}


def test_fetching_every_pair_has_no_divergence_and_one_bit_alone_has(model):
    task = Fidelity(lengths=(300,), new=NEW, along=("text",))
    (item,) = task.items(model)
    everything = measured(task, model, item, SpeCacheMethod.with_settings({"top_k": 10**6}))
    alone = measured(task, model, item, KiviMethod(bits=1))
    assert max(everything.values) < 1e-5
    assert sum(alone.values) > 1000 * sum(everything.values)


def test_the_given_text_is_followed_token_by_token(model):
    task = Fidelity(lengths=(300,), new=NEW, along=("text",))
    (item,) = task.items(model)
    following = model.tokenizer(item.facts["following"], add_special_tokens=False)["input_ids"]
    prompt = Prefilled(model.model, item.prompt)
    with torch.no_grad(), attached(model.model):
        reference = task.prepare(model, item, prompt).reference
    prompt.close()
    assert reference.inputs == following[:NEW]
    assert reference.targets == following[1 : NEW + 1]
    whole = torch.tensor([item.prompt + following[:NEW]])
    with torch.no_grad():
        expected = model.model(whole).logits[0, -NEW:].log_softmax(-1)
    torch.testing.assert_close(reference.log_probs, expected, atol=1e-4, rtol=1e-4)


def test_perplexity_is_that_of_a_plain_forward_pass(model):
    task = Perplexity(length=300, new=20, documents=1)
    (item,) = task.items(model)
    result = measured(task, model, item, FullMethod())
    whole = torch.tensor([item.prompt + item.facts["following"]])
    assert whole.shape == (1, 300)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model.model(whole).logits[0, -21:-1], whole[0, -20:])
    assert math.isclose(sum(result.values) / 20, expected.item(), rel_tol=1e-4)


def test_a_text_without_a_length_fills_the_models_positions(model):
    positions = model.model.config.max_position_embeddings
    (item,) = Perplexity(new=20, documents=1).items(model)
    assert len(item.prompt) + 20 == min(PAPER_TOKENS, positions)
    assert Perplexity().settings()["length"] is None


def test_tokens_that_the_model_excludes_hide_no_divergence():
    """Some models give -inf to tokens that cannot come. A divergence of NaN was counted as 0."""
    (expected, actual), excluded = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1), [7, 30]
    others = [token for token in range(50) if token not in excluded]
    right = float((expected.exp() * (expected - actual))[others].sum())
    expected[excluded] = actual[excluded] = -torch.inf
    assert divergence(expected, actual) == pytest.approx(right, rel=1e-5) and right > 0.1
    assert divergence(expected[others], expected[others]) == 0.0
    assert divergence(expected, torch.full((50,), -torch.inf)) == math.inf
    assert math.isnan(divergence(expected, torch.full((50,), torch.nan)))


def test_a_tokenizer_without_offsets_gets_the_same_excerpts(tmp_path):
    """One in Python, as a model's own code may bring: it was a KeyError."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Sentence number {number} says little." for number in range(200)))
    fast = byte_tokenizer()

    def slow(piece: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": fast(piece, add_special_tokens=options.get("add_special_tokens", True))["input_ids"]}

    assert excerpts(slow, (text,), [300, 500], NEW, 0) == excerpts(fast, (text,), [300, 500], NEW, 0)
    with pytest.raises(TaskDataError, match="too short"):
        excerpts(slow, (text,), [9000], NEW, 0)


def test_wrong_options_and_short_texts_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="along takes text and answer"):
        Fidelity(along=("nothing",))
    with pytest.raises(ConfigError, match="new must be at least 1"):
        Fidelity(new=0)
    with pytest.raises(ConfigError, match="positions"):
        list(Fidelity(lengths=(10**5,)).items(model))
    with pytest.raises(ConfigError, match="more than --new"):
        Perplexity(length=10, new=20)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(TaskDataError, match="too short"):
        excerpts(model.tokenizer, (short,), [300], NEW, 0)
