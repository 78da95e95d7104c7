"""The eight needle tasks: sentences that give keys values, hidden in a text, and a question."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from specache.eval.tasks.ruler.essay import Essay
from specache.eval.tasks.ruler.sample import NOISE, Question
from specache.eval.tasks.ruler.scoring import Score, string_match_all
from specache.eval.tasks.ruler.words import word_pair

_DEPTHS = [round(100 * step / 39) for step in range(40)]  # percent of an essay's sentences
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
_SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)


class Haystack(StrEnum):
    """The text that hides the needles."""

    NOISE = "noise"  # one sentence, repeated
    ESSAY = "essay"
    NEEDLES = "needles"  # needles that no question asks about


class Kind(StrEnum):
    """The kind of keys and values, as the prompt calls it."""

    WORDS = "words"
    NUMBERS = "numbers"
    UUIDS = "uuids"


@dataclass(frozen=True)
class Needles:
    """One needle task. Its size is lines of the haystack, or words of the essay."""

    haystack: Haystack
    key_kind: Kind = Kind.WORDS
    value_kind: Kind = Kind.NUMBERS
    keys: int = 1
    values_per_key: int = 1
    keys_per_question: int = 1
    several_questions: bool = False
    essay: Essay | None = None

    @property
    def max_new_tokens(self) -> int:
        return 128

    @property
    def score(self) -> Score:
        return string_match_all

    def smallest(self, questions: int) -> int:
        return self._keys(questions) * self.values_per_key

    def questions(self, asked: int) -> int:
        return asked if self.several_questions else 1

    def sample(self, rng: Random, size: int, *, length: int, questions: int) -> list[Question]:
        keys = _distinct(rng, self.key_kind, self._keys(questions), taken=set())
        values = {key: [_random(rng, self.value_kind) for _ in range(self.values_per_key)] for key in keys}
        needles = [self._needle(key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        context = self._hide(rng, needles, size, taken=set(keys))
        asked = rng.sample(keys, questions * self.keys_per_question)
        step = self.keys_per_question
        return [self._question(context, asked[at : at + step], values) for at in range(0, len(asked), step)]

    def _keys(self, questions: int) -> int:
        """Return the number of keys. Questions share none, so no answer is given away twice."""
        return max(self.keys, questions * self.keys_per_question)

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _hide(self, rng: Random, needles: list[str], size: int, taken: set[str]) -> str:
        if self.haystack is Haystack.ESSAY:
            assert self.essay is not None
            return _between_sentences(rng, needles, self.essay.sentences(size))
        if self.haystack is Haystack.NOISE:
            lines = [NOISE] * size
        else:
            keys = _distinct(rng, self.key_kind, size, taken)
            lines = [self._needle(key, _random(rng, self.value_kind)) for key in keys]
        for position, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
            lines.insert(position, needle)
        return "\n".join(lines)

    def _question(self, context: str, keys: list[str], values: dict[str, list[str]]) -> Question:
        references = [value for key in keys for value in values[key]]
        message, prefix = _ONE if len(references) == 1 else _SEVERAL
        kind = self.value_kind.removesuffix("s") if len(references) == 1 else str(self.value_kind)
        query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
        needles = [self._needle(key, value) for key in keys for value in values[key]]
        return Question(
            text=message.format(kind=kind, context=context, query=query),
            answer_prefix=prefix.format(kind=kind, query=query),
            references=references,
            depths=[context.index(needle) / max(1, len(context) - len(needle)) for needle in needles],
        )


def _between_sentences(rng: Random, needles: list[str], sentences: list[str]) -> str:
    positions = sorted(len(sentences) * depth // 100 for depth in rng.sample(_DEPTHS, len(needles)))
    parts: list[str] = []
    last = 0
    for position, needle in zip(positions, needles, strict=True):
        parts += [*sentences[last:position], needle]
        last = position
    return " ".join([*parts, *sentences[last:]])


def _distinct(rng: Random, kind: Kind, count: int, taken: set[str]) -> list[str]:
    made: list[str] = []
    while len(made) < count:
        key = _random(rng, kind)
        if key not in taken:
            taken.add(key)
            made.append(key)
    return made


def _random(rng: Random, kind: Kind) -> str:
    match kind:
        case Kind.WORDS:
            return word_pair(rng)
        case Kind.NUMBERS:
            return str(rng.randrange(10**6, 10**7))
        case Kind.UUIDS:
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
