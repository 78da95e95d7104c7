"""`cwe` and `fwe`: find the most frequent words.

In `cwe` the words are a numbered list. In `fwe` they are coded words whose frequencies follow a
zeta law.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from random import Random

from specache.eval.tasks.ruler.sample import Question
from specache.eval.tasks.ruler.scoring import Score, string_match_all
from specache.eval.tasks.ruler.words import distinct_words

_LIST_MESSAGE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
_LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_CODED_MESSAGE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
_SHORT = 4096  # below this length the lists are shorter
_COMMON = 10
_NOISE_WORD = "..."
_CODED_LETTERS = 6
_TOKENS_PER_CODED_WORD = 50  # tokens of the length per word of the vocabulary


@dataclass(frozen=True)
class _Repeats:
    words: int  # different words
    common: int
    uncommon: int


@dataclass(frozen=True)
class CommonWords:
    """`cwe`: ten words are much more frequent than all others, after one solved example.

    Its size is the number of different words.
    """

    @property
    def max_new_tokens(self) -> int:
        return 120

    @property
    def score(self) -> Score:
        return string_match_all

    def smallest(self, questions: int) -> int:
        return _COMMON + 1

    def questions(self, asked: int) -> int:
        return 1

    def sample(self, rng: Random, size: int, *, length: int, questions: int) -> list[Question]:
        short = length < _SHORT
        example = _Repeats(20, 3, 1) if short else _Repeats(40, 10, 3)
        shown, answer = _word_list(rng, example)
        context, common = _word_list(rng, _Repeats(size, 6, 1) if short else _Repeats(size, 30, 3))
        solved = _LIST_MESSAGE.format(context=shown) + _LIST_PREFIX + " " + _numbered(answer)
        return [Question(solved + "\n" + _LIST_MESSAGE.format(context=context), _LIST_PREFIX, common)]


def _word_list(rng: Random, repeats: _Repeats) -> tuple[str, list[str]]:
    words = distinct_words(rng, repeats.words)
    common, uncommon = words[:_COMMON], words[_COMMON:]
    entries = common * repeats.common + uncommon * repeats.uncommon
    rng.shuffle(entries)
    return _numbered(entries), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


@dataclass(frozen=True)
class FrequentWords:
    """`fwe`: the k-th word is k^-alpha / zeta(alpha) of the text, and the first word is dots.

    Its size is roughly the number of words. Source: RULER, section 3; alpha = 2, where zeta(2) =
    pi^2 / 6.
    """

    @property
    def max_new_tokens(self) -> int:
        return 50

    @property
    def score(self) -> Score:
        return string_match_all

    def smallest(self, questions: int) -> int:
        return 75  # least size with the third coded word (size / 26.3 times) ahead of the fourth (size / 41.1 times)

    def questions(self, asked: int) -> int:
        return 1

    def sample(self, rng: Random, size: int, *, length: int, questions: int) -> list[Question]:
        vocabulary = [_NOISE_WORD, *_coded_words(rng, max(4, length // _TOKENS_PER_CODED_WORD - 1))]
        counts = [int(size / rank**2 / (math.pi**2 / 6)) for rank in range(1, len(vocabulary) + 1)]
        text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        rng.shuffle(text)
        return [Question(_CODED_MESSAGE.format(context=" ".join(text)), _CODED_PREFIX, vocabulary[1:4])]


def _coded_words(rng: Random, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))] = None
    return list(words)
