"""Generate documents: facts scattered through prose, some repeated, some corrected further on.

A draft has all facts of a document. How many filler sentences stand between them decides how long
the document is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from random import Random

from specache.eval.tasks.extract.schemas import Record, Schema, Value, stated_fields
from specache.eval.tasks.extract.schemas.vocabulary import WORDS

SENTENCES_PER_PARAGRAPH = (3, 8)
_NOVEL_FILLERS = 20  # draws before a filler sentence may occur twice

Placed = tuple[float, str]  # position in the document, from 0 to 1, and sentence


@dataclass(frozen=True)
class Correction:
    """A field that the document first states wrongly, then corrects."""

    key: Value
    field: str
    old: Value
    new: Value


class Draft:
    """The facts of a document, each with its place. `text` writes it at any length.

    Attributes:
        records: what is to be extracted, in the order in which the text first names them.
        corrections: fields whose first statement is wrong.
        repetitions: (key, field) of the fields that are stated again in other words.

    Args:
        rng: a fresh generator. Equal seeds give equal drafts.
        count: records.
        corrected: share of the records of which one field is corrected.
        repeated: share of the other records of which one field is repeated.
        without: keys that no record may have.
    """

    def __init__(
        self,
        schema: Schema,
        rng: Random,
        count: int,
        *,
        corrected: float = 0.0,
        repeated: float = 0.0,
        without: Collection[Value] = (),
    ) -> None:
        self.schema = schema
        self.records: list[Record] = list(_distinct_records(schema, rng, count, without))
        self.corrections: list[Correction] = []
        self.repetitions: list[tuple[Value, str]] = []
        self._title = _with_words(schema.title, rng)
        self._facts: list[Placed] = []
        self._fillers: list[Placed] = []
        self._used: set[str] = set()
        self._filler_rng = Random(rng.getrandbits(64))
        self._layout_seed = rng.getrandbits(64)
        order = rng.sample(range(count), count)
        wrong = set(order[: round(corrected * count)])
        again = set(order[len(wrong) : len(wrong) + round(repeated * (count - len(wrong)))])
        for index, record in enumerate(self.records):
            place = (index + 0.9 * rng.random()) / count  # introductions stay in order
            self._write(record, place, rng, is_corrected=index in wrong, is_repeated=index in again)
        self._facts.sort()

    def text(self, fillers: int) -> str:
        """Return the document with this many filler sentences, in paragraphs, under a title."""
        while len(self._fillers) < fillers:
            self._fillers.append((self._filler_rng.random(), self._filler()))
        sentences = [sentence for _, sentence in sorted([*self._facts, *self._fillers[:fillers]])]
        rng = Random(self._layout_seed)
        paragraphs = [self._title]
        while sentences:
            size = rng.randint(*SENTENCES_PER_PARAGRAPH)
            paragraphs.append(" ".join(sentences[:size]))
            del sentences[:size]
        return "\n\n".join(paragraphs)

    def _write(self, record: Record, place: float, rng: Random, *, is_corrected: bool, is_repeated: bool) -> None:
        """Place all sentences about a record: its introduction, then the others anywhere later."""
        key = self.schema.key
        stated = dict(record)
        last = 1.0
        if is_corrected:
            field = rng.choice(list(self.schema.corrections))
            correction = Correction(record[key], field, self._other_value(record, field, rng), record[field])
            self.corrections.append(correction)
            stated[field] = correction.old
            last = place + (1 - place) * rng.uniform(0.3, 1.0)
            sentence = rng.choice(self.schema.corrections[field])
            self._facts.append((last, sentence.format(key=correction.key, old=correction.old, new=correction.new)))
        introduction = rng.choice(self.schema.introductions)
        self._facts.append((place, introduction.format(**stated)))
        places = {field: place for field in stated_fields(introduction)}
        for field in [field for field in record if field not in places]:
            places[field] = _between(place, last, rng)
            self._facts.append((places[field], _template_for(self.schema.statements, field, rng).format(**stated)))
        if is_repeated:
            field = rng.choice([name for name in record if name != key])
            self.repetitions.append((record[key], field))
            template = _template_for(self.schema.repetitions, field, rng)
            self._facts.append((_between(places[field], 1.0, rng), template.format(**record)))

    def _other_value(self, record: Record, field: str, rng: Random) -> Value:
        """Draw a wrong value of a field, one that the record has nowhere."""
        while (value := self.schema.record(rng)[field]) in record.values():
            pass
        return value

    def _filler(self) -> str:
        for _ in range(_NOVEL_FILLERS):
            sentence = _with_words(self._filler_rng.choice(self.schema.fillers), self._filler_rng)
            if sentence not in self._used:
                break
        self._used.add(sentence)
        return sentence


def _distinct_records(schema: Schema, rng: Random, count: int, without: Collection[Value]) -> Iterator[Record]:
    keys = set(without)
    for _ in range(count):
        while (record := schema.record(rng))[schema.key] in keys:
            pass
        keys.add(record[schema.key])
        yield record


def _template_for(templates: tuple[str, ...], field: str, rng: Random) -> str:
    return rng.choice([template for template in templates if field in stated_fields(template)])


def _between(first: float, last: float, rng: Random) -> float:
    """Draw a place after `first` and before `last`, near the first one as often as far from it."""
    return first + (last - first) * rng.random() ** 2


def _with_words(template: str, rng: Random) -> str:
    return template.format(**{slot: WORDS[slot](rng) for slot in sorted(stated_fields(template))})
