"""`multi-needle`: many planted facts in a long text, all asked for in one question.

One needle is found by methods that keep a few places of the context. An answer that needs 8 to 32
places at once shows whether they keep all of them (*KV Cache Offloading for Context-Intensive
Tasks*, arXiv 2604.08426).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from specache.errors import ConfigError, TaskDataError
from specache.eval.tasks.answer_task import AnswerTask, Generated, Question
from specache.eval.tasks.base import Measurement
from specache.eval.tasks.needle import FACT, PLACES, Fact, plant, split_text
from specache.eval.tasks.texts import check_at_least, check_distinct, load_text

PROMPT = (
    "Here is a document. Secret access codes of places are hidden in it.\n\n{document}\n\nEnd of the document.\n\n"
    "What are the secret access codes of these places: {places}? Write one line per place, in this order: the place, a colon and "
    "its code."
)
BEGINNING = "The secret access codes:\n"


@dataclass(frozen=True)
class MultiNeedle(AnswerTask):
    """Find many planted facts at once."""

    name: ClassVar[str] = "multi-needle"
    summary: ClassVar[str] = "8 to 32 planted facts in a long text, all asked for in one question"
    needles: tuple[int, ...] = field(default=(8, 16, 32), metadata={"help": "Planted facts per document."})
    haystack: tuple[Path, ...] = field(default=(), metadata={"help": "Text files (default: Python's own documentation)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "needles")
        check_distinct(self, "needles")
        if max(self.needles) > len(PLACES):
            raise ConfigError(f"--needles can be at most {len(PLACES)}, got {max(self.needles)}.")

    def generated(self, length: int) -> Iterator[Generated]:
        pieces = list(split_text(load_text(self.haystack)))
        for needles in self.needles:
            for number in range(self.documents):
                key = f"{needles}/{length}/{number}"

                def make(size: int, key: str = key, needles: int = needles) -> list[Question]:
                    return [self._question(random.Random(f"{self.name} {self.seed} {key}"), pieces, needles, size)]

                yield Generated(key, f"{self.name}/{needles}/{length}", make)

    def is_complete(self, prediction: str, facts: dict[str, Any]) -> bool:
        return prediction.count("\n") >= len(facts["codes"])

    def score(self, prediction: str, facts: dict[str, Any]) -> Measurement:
        """Score each needle by whether the answer has its code, wherever it is.

        `details` says whether all lines are right (`exact`).
        """
        codes: dict[str, str] = facts["codes"]
        numbers = set(re.findall(r"\d+", prediction))
        lines = [" ".join(line.split()) for line in f"{facts['answer'][0][0]}{prediction}".strip().splitlines()[1:]]
        exact = lines == [f"{place}: {code}" for place, code in codes.items()]
        found = [float(code in numbers) for code in codes.values()]
        return Measurement(found, details={"prediction": prediction, "exact": exact, "references": list(codes.values())})

    def _question(self, rng: random.Random, pieces: list[str], needles: int, size: int) -> Question:
        """Ask for all needles of a document of `size` pieces, in another order than the text's.

        Each needle is somewhere in its own equal part of the document.
        """
        if size > len(pieces):
            raise TaskDataError(f"the haystack has only {len(pieces):,} pieces of text: pass more or longer files.")
        start = rng.randrange(len(pieces))
        places = rng.sample(PLACES, needles)
        codes = rng.sample(range(10_000, 100_000), needles)
        depths = [(number + rng.random()) / needles for number in range(needles)]
        facts = [
            Fact(FACT.format(place=place, code=code), "", str(code), depth)
            for place, code, depth in zip(places, codes, depths, strict=True)
        ]
        taken = [pieces[(start + step) % len(pieces)] for step in range(size)]
        asked = list(zip(places, map(str, codes), strict=True))
        rng.shuffle(asked)
        answer = [(f"{BEGINNING}{asked[0][0]}:", False), (" ", False), (asked[0][1], True)]
        for place, code in asked[1:]:
            answer += [(f"\n{place}: ", False), (code, True)]
        document = plant(taken, [len(piece) for piece in taken], facts)
        prompt = PROMPT.format(document=document, places=", ".join(place for place, _ in asked))
        return Question(prompt, answer, {"codes": dict(asked), "depths": dict(zip(places, depths, strict=True))})
