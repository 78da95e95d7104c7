"""`vt`, variable tracking: a chain of assignments hidden in noise.

The question is which variables hold its value.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from specache.eval.tasks.ruler.sample import NOISE, Question
from specache.eval.tasks.ruler.scoring import Score, string_match_all

_MESSAGE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: "
)
_LETTERS, _EXAMPLE_LETTERS = 5, 3
_EXAMPLE_NOISE = 10  # sentences: the example has about 400 tokens
_SHORT = 1024  # below this length the example has the least noise


@dataclass(frozen=True)
class VariableTracking:
    """`vt`: one chain, after one solved example. Its size is the number of noise sentences."""

    hops: int = 4

    @property
    def max_new_tokens(self) -> int:
        return 30

    @property
    def score(self) -> Score:
        return string_match_all

    def smallest(self, questions: int) -> int:
        return self.hops + 2

    def questions(self, asked: int) -> int:
        return 1

    def sample(self, rng: Random, size: int, *, length: int, questions: int) -> list[Question]:
        example = self._chain(rng, _EXAMPLE_LETTERS, _EXAMPLE_NOISE if length >= _SHORT else self.smallest(1))
        solved = f"{example.text}{example.answer_prefix} {' '.join(example.references)}\n\n\n\n"
        asked = self._chain(rng, _LETTERS, size)
        return [Question(solved + asked.text, asked.answer_prefix, asked.references, asked.depths)]

    def _chain(self, rng: Random, letters: int, noise: int) -> Question:
        names = _names(rng, self.hops + 1, letters)
        value = str(rng.randrange(10_000, 99_999))
        links = [f"VAR {names[0]} = {value}"]
        links += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
        sentences = [NOISE + "\n"] * noise
        positions = sorted(rng.sample(range(noise), len(links)))
        for done, (position, link) in enumerate(zip(positions, links, strict=True)):
            sentences.insert(position + done, link)
        context = " ".join(sentences)
        return Question(
            text=_MESSAGE.format(context=context, value=value),
            answer_prefix=_PREFIX.format(count=len(names), value=value),
            references=names,
            depths=[context.index(link) / len(context) for link in links],
        )


def _names(rng: Random, count: int, letters: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    return names
