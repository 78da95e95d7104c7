"""`qa_1` and `qa_2`: questions of a reading benchmark over its own documents and others."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from specache.errors import TaskDataError
from specache.eval.tasks.ruler.sample import Question
from specache.eval.tasks.ruler.scoring import Score, string_match_part
from specache.eval.tasks.texts import load_text

_MESSAGE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
_PREFIX = " Answer:"
_DOCUMENT = "Document {number}:\n{text}"

Node = TypeVar("Node", str, list[Any], dict[str, Any])


@dataclass(frozen=True)
class Asked:
    """A question of a corpus.

    Attributes:
        gold: documents with the answer, as indices into `Corpus.documents`.
        near: documents that resemble them.
    """

    query: str
    answers: list[str]
    gold: list[int]
    near: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Corpus:
    """Questions that have answers, and all documents in alphabetical order."""

    asked: list[Asked]
    documents: list[str]


@dataclass(frozen=True)
class QuestionAnswering:
    """One question over its own and other documents. Its size is the number of other documents."""

    corpus: Corpus

    @property
    def max_new_tokens(self) -> int:
        return 32

    @property
    def score(self) -> Score:
        return string_match_part

    def smallest(self, questions: int) -> int:
        return 0

    def questions(self, asked: int) -> int:
        return 1

    def sample(self, rng: Random, size: int, *, length: int, questions: int) -> list[Question]:
        asked = rng.choice(self.corpus.asked)
        shown = [*asked.gold, *self._others(rng, asked, size)]
        rng.shuffle(shown)
        documents = [
            _DOCUMENT.format(number=number, text=self.corpus.documents[document]) for number, document in enumerate(shown, start=1)
        ]
        context = "\n\n".join(documents)
        starts = [context.index(documents[shown.index(gold)]) / max(1, len(context)) for gold in asked.gold]
        return [Question(_MESSAGE.format(context=context, query=asked.query), _PREFIX, asked.answers, starts)]

    def _others(self, rng: Random, asked: Asked, count: int) -> list[int]:
        """Return other documents, near ones first. A corpus that is too small is repeated."""
        near = rng.sample(asked.near, min(count, len(asked.near)))
        known = {*asked.gold, *asked.near}
        far = [number for number in range(len(self.corpus.documents)) if number not in known]
        rng.shuffle(far)
        others = near + far
        again = others or asked.gold
        while len(others) < count:
            others = others + again
        return others[:count]


def read_squad(file: Path) -> Corpus:
    """Read SQuAD's JSON, version 1.1 or 2.0. Unanswerable questions are skipped.

    Raises:
        TaskDataError: the file is missing, not JSON or not SQuAD's. The message names the place.
    """
    found: list[tuple[str, list[str], str, list[str]]] = []
    texts: set[str] = set()
    for a, article in enumerate(_get(_json(file), "data", list, file, "")):
        where = f"data[{a}]"
        paragraphs = [
            (_get(paragraph, "context", str, file, f"{where}.paragraphs[{p}]"), paragraph)
            for p, paragraph in enumerate(_get(article, "paragraphs", list, file, where))
        ]
        contexts = [context for context, _ in paragraphs]
        texts.update(contexts)
        for p, (context, paragraph) in enumerate(paragraphs):
            for q, asked in enumerate(_get(paragraph, "qas", list, file, f"{where}.paragraphs[{p}]")):
                place = f"{where}.paragraphs[{p}].qas[{q}]"
                answers = [
                    _get(answer, "text", str, file, f"{place}.answers[{n}]")
                    for n, answer in enumerate(_get(asked, "answers", list, file, place))
                ]
                if answers and not asked.get("is_impossible"):
                    found.append((_get(asked, "question", str, file, place), answers, context, contexts))
    documents = sorted(texts)
    number = {text: index for index, text in enumerate(documents)}
    questions = [
        Asked(query, answers, [number[context]], sorted({number[other] for other in contexts} - {number[context]}))
        for query, answers, context, contexts in found
    ]
    return _checked(questions, documents, file)


def read_hotpotqa(file: Path) -> Corpus:
    """Read HotpotQA's JSON (distractor setting: two documents with the answer, eight similar ones).

    Raises:
        TaskDataError: the file is missing, not JSON or not HotpotQA's. The message names the place.
    """
    entries = _json(file)
    if not isinstance(entries, list):
        raise TaskDataError(f"{file} is not HotpotQA's JSON: a list of questions was expected at the top.")
    found = [_hotpot_question(entry, file, f"[{index}]") for index, entry in enumerate(entries)]
    documents = sorted({text for _, _, gold, near in found for text in gold + near})
    number = {text: index for index, text in enumerate(documents)}
    questions = [
        Asked(query, [answer], [number[text] for text in gold], [number[text] for text in near])
        for query, answer, gold, near in found
    ]
    return _checked(questions, documents, file)


def _hotpot_question(entry: Any, file: Path, where: str) -> tuple[str, str, list[str], list[str]]:
    """Return question, answer, documents with the answer, and the other documents.

    All documents count as having the answer where the file does not say which do.
    """
    texts: dict[str, str] = {}
    for d, document in enumerate(_get(entry, "context", list, file, where)):
        try:
            title, sentences = document
            texts[title] = f"{title}\n{''.join(sentences)}"
        except (TypeError, ValueError):
            raise TaskDataError(f"{file}: {where}.context[{d}] is not [title, [sentences]].") from None
    facts = entry.get("supporting_facts")
    named = [fact[0] for fact in facts if isinstance(fact, list) and fact] if isinstance(facts, list) else []
    gold = [text for title, text in texts.items() if title in named] or list(texts.values())
    near = [text for text in texts.values() if text not in gold]
    return _get(entry, "question", str, file, where), _get(entry, "answer", str, file, where), gold, near


def _checked(questions: list[Asked], documents: list[str], file: Path) -> Corpus:
    if not questions:
        raise TaskDataError(f"{file} has no question with an answer.")
    return Corpus(questions, documents)


def _json(file: Path) -> Any:
    try:
        return json.loads(load_text((file,)))
    except json.JSONDecodeError as error:
        raise TaskDataError(f"{file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None


def _get(node: Any, key: str, kind: type[Node], file: Path, where: str) -> Node:
    value = node.get(key) if isinstance(node, dict) else None
    if not isinstance(value, kind):
        place = f"{where}.{key}".lstrip(".")
        names = {str: "a string", list: "a list", dict: "an object"}
        raise TaskDataError(f"{file}: {place} is missing or not {names[kind]}.")
    return value
