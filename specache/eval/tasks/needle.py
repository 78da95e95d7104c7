"""Needle-in-a-Haystack (Kamradt 2023): a fact in a long document, and a question about it."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from specache.errors import ConfigError, TaskDataError
from specache.eval.methods.base import Session
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel, greedy
from specache.eval.tasks.texts import (
    check_at_least,
    check_distinct,
    check_length,
    encode_prompt,
    json_settings,
    load_text,
    shared_prefix,
)
from specache.templates.template import ChatTemplate

# A document can hold one needle of ours per place.
_PLACES = (
    "archive bakery castle chapel cinema clinic college courthouse embassy factory farm forge foundry gallery garage harbour "
    "hospital hotel laboratory library lighthouse market mill mine monastery museum nursery observatory office orchard palace "
    "pharmacy planetarium port post-office power-station prison quarry refinery reservoir restaurant school shipyard stadium "
    "station studio temple theatre tower town-hall treasury tunnel university vault vineyard warehouse waterworks windmill "
    "workshop zoo"
)
PLACES = _PLACES.split()
FACT = "The secret access code of the {place} is {code}. Remember it."
QUESTION = "What is the secret access code of the {place}?"
PIECE = 400  # most characters between two places where a needle may go

Cell = tuple[int, float]  # length in tokens, depth as a fraction


@dataclass(frozen=True)
class Fact:
    """A needle: its sentence, its question and answer, and its depth as a fraction."""

    text: str
    question: str
    answer: str
    depth: float


@dataclass(frozen=True)
class Needle:
    """Find a planted fact, over a grid of lengths and depths."""

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "Needle-in-a-Haystack: a planted fact, by length and depth (heat map)"
    unit: ClassVar[str] = "score"
    lengths: tuple[int, ...] = field(default=(1000, 2000, 4000), metadata={"help": "Prompt lengths, in tokens."})
    depths: tuple[float, ...] = field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), metadata={"help": "Where the needle goes, as fractions of the document."}
    )
    documents: int = field(default=1, metadata={"help": "Haystacks per length, each from another place of the text."})
    needles: int = field(default=1, metadata={"help": "Needles per cell and haystack, each asked for in an item of its own."})
    together: bool = field(
        default=False,
        metadata={"help": "Plant the needles of all depths in one document: one prefill per length instead of one per cell."},
    )
    haystack: tuple[Path, ...] = field(default=(), metadata={"help": "Text files (default: Python's own documentation)."})
    needle: str = field(default="", metadata={"help": "A sentence to plant instead of a random code (with --question, --answer)."})
    question: str = field(default="", metadata={"help": "The question about --needle."})
    answer: str = field(default="", metadata={"help": "What the answer to --question must contain."})
    chat: bool = field(default=True, metadata={"help": "Ask as a user's message, if the model has a chat template."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer, in tokens."})
    seed: int = field(default=0, metadata={"help": "Decides the codes and where haystacks begin."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "lengths", "documents", "needles", "max_new_tokens")
        check_distinct(self, "lengths", "depths")
        if not self.depths or min(self.depths) < 0 or max(self.depths) > 1:
            raise ConfigError(f"--depths must be fractions from 0 to 1, got {self.depths}.")
        own = [bool(text.strip()) for text in (self.needle, self.question, self.answer)]
        if any(own) and not all(own):
            raise ConfigError("--needle, --question and --answer go together: pass all three or none.")
        if any(own) and (self.needles > 1 or self.together):
            raise ConfigError("a --needle of your own is one per document: leave out --needles and --together.")
        if any(own) and self.answer.lower() not in self.needle.lower():
            raise ConfigError(f"--answer {self.answer!r} does not occur in --needle.")
        wanted = self.needles * (len(self.depths) if self.together else 1)
        if wanted > len(PLACES):
            raise ConfigError(f"a document can hold {len(PLACES)} needles, not {wanted}. Use more --documents instead.")

    def settings(self) -> dict[str, Any]:
        return json_settings(self)

    def items(self, model: TaskModel) -> Iterator[Item]:
        haystack = Haystack(load_text(self.haystack), model.tokenizer)
        for length in self.lengths:
            check_length(length + self.max_new_tokens, model.max_positions, f"a needle at length {length}")
            for document in range(self.documents):
                start = random.Random(f"haystack {self.seed} {length} {document}").randrange(len(haystack.pieces))
                for depths in [self.depths] if self.together else [(depth,) for depth in self.depths]:
                    facts = self._facts(length, document, depths)
                    yield from self._document(model.template, haystack, start, length, document, facts)

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        return Prepared(item, prompt)

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        references = prepared.item.facts["references"]

        def text(tokens: list[int]) -> str:
            return model.answer_text(tokens, prepared.item.prompt, chat=self.chat)

        tokens = greedy(
            prepared.prompt.logits,
            session,
            self.max_new_tokens,
            model.end_ids(chat=self.chat),
            finished=lambda tokens: contains_any(text(tokens), references),
        )
        prediction = text(tokens)
        right = contains_any(prediction, references)
        return Measurement([float(right)], details={"prediction": prediction, "references": references})

    def figures(self, rows: list[dict[str, Any]], cells: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the heat maps of all methods, side by side.

        Args:
            rows: not used: a heat map is made of single cells.
            cells: one dict per item and method, with `method`, `values` and `facts`.
        """
        grids: dict[str, dict[Cell, list[float]]] = defaultdict(lambda: defaultdict(list))
        for cell in cells:
            grids[cell["method"]][cell["facts"]["length"], cell["facts"]["depth"]] += cell["values"]
        return {"needle": heat_maps(grids)} if grids else {}

    def _facts(self, length: int, document: int, depths: tuple[float, ...]) -> list[Fact]:
        if self.needle:
            return [Fact(self.needle.strip(), self.question.strip(), self.answer.strip(), depth) for depth in depths]
        rng = random.Random(f"needle {self.seed} {length} {document} {depths}")
        count = self.needles * len(depths)
        codes = rng.sample(range(10_000, 100_000), count)
        where = [depth for depth in depths for _ in range(self.needles)]
        return [
            Fact(FACT.format(place=place, code=code), QUESTION.format(place=place), str(code), depth)
            for place, code, depth in zip(rng.sample(PLACES, count), codes, where, strict=True)
        ]

    def _document(
        self, template: ChatTemplate, haystack: Haystack, start: int, length: int, document: int, facts: list[Fact]
    ) -> Iterator[Item]:
        prompts = self._prompts(template, haystack, start, length, facts)
        shared = shared_prefix(prompts)
        for index, (fact, prompt) in enumerate(zip(facts, prompts, strict=True)):
            yield Item(
                id=f"needle/{length}/{document}/{fact.depth:g}/{index % self.needles}",
                group=self.name,
                prompt=prompt,
                shared=shared,
                facts={"length": length, "depth": fact.depth, "references": [fact.answer], "needle": fact.text},
            )

    def _prompts(self, template: ChatTemplate, haystack: Haystack, start: int, length: int, facts: list[Fact]) -> list[list[int]]:
        """Return one prompt per fact over the same document, filling `length` tokens."""

        def encode(pieces: list[str], lengths: list[int]) -> list[list[int]]:
            text = plant(pieces, lengths, facts)
            return [encode_prompt(template, _prompt_text(text, fact.question), chat=self.chat) for fact in facts]

        least = max(map(len, encode([], [])))
        if least + PIECE > length:
            raise ConfigError(f"--lengths must be at least {least + PIECE} tokens for these needles, got {length}.")
        pieces, lengths = haystack.take(start, length - least)
        while max(map(len, prompts := encode(pieces, lengths))) > length:  # tokens merge differently at the seams
            pieces, lengths = pieces[:-1], lengths[:-1]
        return prompts


class Haystack:
    """A text in pieces that end at a sentence or a paragraph, with the number of tokens of each."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.pieces = list(split_text(text))
        self._tokenizer = tokenizer
        self._lengths: dict[int, int] = {}

    def take(self, start: int, budget: int) -> tuple[list[str], list[int]]:
        """Return pieces from `start` on that fill `budget` tokens, and their lengths.

        After the last piece comes the first.

        Raises:
            TaskDataError: all pieces together are shorter.
        """
        pieces: list[str] = []
        lengths: list[int] = []
        for step in range(len(self.pieces)):
            index = (start + step) % len(self.pieces)
            length = self._length(index)
            if sum(lengths) + length > budget:
                return pieces, lengths
            pieces.append(self.pieces[index])
            lengths.append(length)
        raise TaskDataError(f"the haystack has only {sum(lengths):,} tokens, {budget:,} are needed: pass more or longer files.")

    def _length(self, index: int) -> int:
        if index not in self._lengths:
            self._lengths[index] = len(self._tokenizer(self.pieces[index], add_special_tokens=False)["input_ids"])
        return self._lengths[index]


def plant(pieces: list[str], lengths: list[int], facts: list[Fact]) -> str:
    """Return the document: each fact is a paragraph of its own, at its depth in tokens."""
    total = sum(lengths)
    before = [sum(lengths[:i]) for i in range(len(pieces) + 1)]
    planted: dict[int, list[str]] = defaultdict(list)
    for fact in facts:
        planted[min(range(len(before)), key=lambda i: abs(before[i] - fact.depth * total))].append(fact.text)
    document = ""
    for index in range(len(pieces) + 1):
        for text in planted[index]:
            document = f"{document.rstrip()}\n\n{text}\n\n" if document.strip() else f"{text}\n\n"
        if index < len(pieces):
            document += pieces[index]
    return document.strip()


def contains_any(prediction: str, references: list[str]) -> bool:
    """Return whether an answer contains one of the references, ignoring case."""
    return any(reference.lower() in prediction.lower() for reference in references)


def heat_maps(grids: dict[str, dict[Cell, list[float]]]) -> Any:
    """Return a matplotlib figure with one panel per method.

    Lengths are along x, depths along y; red is 0 and green is 1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({length for grid in grids.values() for length, _ in grid})
    depths = sorted({depth for grid in grids.values() for _, depth in grid})
    columns = min(len(grids), 3)
    lines = -(-len(grids) // columns)
    width, height = max(2.6, 0.75 * len(lengths) + 0.6), max(2.2, 0.42 * len(depths) + 0.9)
    figure = Figure(figsize=(width * columns + 1.2, height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    image = None
    for number, (panel, (method, grid)) in enumerate(zip(panels, grids.items(), strict=False)):
        image = _heat_map(panel, grid, lengths, depths)
        everything = [value for values in grid.values() for value in values]
        panel.set_title(f"{method}: {100 * sum(everything) / len(everything):.1f} %", fontsize=10)
        if number % columns == 0:
            panel.set_ylabel("depth, % of the document")
        if number + columns >= len(grids):
            panel.set_xlabel("length, tokens")
            panel.tick_params(labelbottom=True)
    for panel in panels[len(grids) :]:
        panel.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="found", shrink=0.9)
    return figure


def _heat_map(panel: Any, grid: dict[Cell, list[float]], lengths: list[int], depths: list[float]) -> Any:
    means = [[_mean(grid.get((length, depth), [])) for length in lengths] for depth in depths]
    panel.set_facecolor("lightgrey")
    image = panel.imshow(means, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(means):
        for x, mean in enumerate(line):
            if mean == mean:  # cells that were not measured stay grey
                color = "black" if 0.15 < mean < 0.85 else "white"  # white on the dark ends of the colour map
                panel.text(x, y, f"{mean:.2f}", ha="center", va="center", fontsize=8, color=color)
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45 if len(lengths) > 6 else 0)
    panel.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
    return image


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _prompt_text(document: str, question: str) -> str:
    return f"Here is a document.\n\n{document}\n\nEnd of the document.\n\n{question}"


def split_text(text: str) -> Iterator[str]:
    """Yield pieces that join to the text again.

    The text is cut after sentences and paragraphs and, where these are long, between words.
    """
    for piece in re.split(r"(?<=\n\n)|(?<=[.!?]\s)", text):
        if len(piece) <= PIECE:
            if piece:
                yield piece
        else:
            yield from re.findall(rf"(?s).{{1,{PIECE}}}(?:\s+|$)|.{{{PIECE}}}", piece)
