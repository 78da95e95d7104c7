"""Reports of made-up companies: each states many figures, one per sentence, in an order of its own.

All reports state the same figures, so that any of them can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

FIRST_YEAR, LAST_YEAR = 1994, 2024
_QUARTERS = ("first", "second", "third", "fourth")

_FIRST = (
    "Alder Birch Cobalt Delta Ember Falcon Granite Harbour Indigo Jade Kestrel Linden Maple Nordic Orchid Pioneer Quartz Raven "
    "Sterling Timber Umber Vega Willow Zenith"
)
_SECOND = "Airlines Bakeries Ceramics Dairies Energy Foods Glass Hotels Labs Logistics Mills Motors Optics Paper Robotics Textiles"
FIRST_WORDS, SECOND_WORDS = _FIRST.split(), _SECOND.split()
MOST_COMPANIES = len(FIRST_WORDS)


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Attributes:
        noun: names it in questions: "number of employees".
        sentences: how reports state it. Each has `company`, `period` and `figure`.
        low, high: the range of its figures.
    """

    noun: str
    sentences: tuple[str, ...]
    low: int
    high: int


KINDS = (
    Kind(
        "number of employees",
        ("In {period}, {company} had {figure} employees.", "{company} counted {figure} employees in {period}."),
        *(120, 9_900),
    ),
    Kind(
        "revenue",
        (
            "The revenue of {company} was {figure} million euros in {period}.",
            "In {period}, {company} had a revenue of {figure} million euros.",
        ),
        *(110, 990),
    ),
    Kind(
        "number of patents",
        ("{company} was granted {figure} patents in {period}.", "In {period}, {figure} patents were granted to {company}."),
        *(11, 190),
    ),
    Kind(
        "number of customers",
        ("In {period}, {figure} customers bought from {company}.", "{company} served {figure} customers in {period}."),
        *(2_100, 89_000),
    ),
    Kind(
        "water consumption",
        (
            "The plants of {company} used {figure} cubic metres of water in {period}.",
            "In {period}, {company} used {figure} cubic metres of water.",
        ),
        *(1_200, 48_000),
    ),
    Kind(
        "number of complaints",
        ("{company} received {figure} complaints in {period}.", "In {period}, {figure} complaints reached {company}."),
        *(21, 870),
    ),
    Kind(
        "number of delivery vans",
        ("In {period}, {company} ran {figure} delivery vans.", "{company} had {figure} delivery vans on the road in {period}."),
        *(12, 640),
    ),
    Kind(
        "training budget",
        (
            "{company} spent {figure} thousand euros on training in {period}.",
            "In {period}, the training of {company} cost {figure} thousand euros.",
        ),
        *(105, 980),
    ),
    Kind(
        "number of apprentices",
        ("In {period}, {company} took on {figure} apprentices.", "{company} trained {figure} apprentices in {period}."),
        *(11, 320),
    ),
    Kind(
        "share price",
        (
            "A share of {company} cost {figure} euros at the end of {period}.",
            "At the end of {period}, a share of {company} was worth {figure} euros.",
        ),
        *(12, 480),
    ),
)
PERIODS = tuple(f"the {quarter} quarter of {year}" for year in range(FIRST_YEAR, LAST_YEAR + 1) for quarter in _QUARTERS)
MOST_FIGURES = len(KINDS) * len(PERIODS)

Figure = tuple[Kind, str]  # kind and period


@dataclass(frozen=True)
class Reports:
    """The reports of some companies.

    Attributes:
        companies: their names, in the order of the reports. First words differ.
        figures: what every report states, in no order.
        values: (company, figure) -> the number.
        text: all reports, each with its sentences in an order of its own.
    """

    companies: list[str]
    figures: list[Figure]
    values: dict[tuple[str, Figure], int]
    text: str

    def of(self, figure: Figure) -> dict[str, int]:
        """Return a figure of all companies, in the order of the reports."""
        return {company: self.values[company, figure] for company in self.companies}


def make_reports(rng: Random, companies: int, figures: int, equal: int) -> Reports:
    """Make reports of `companies` companies with `figures` figures each.

    The first `equal` figures are equal for exactly two companies. All other figures differ.
    """
    names = [f"{first} {rng.choice(SECOND_WORDS)}" for first in rng.sample(FIRST_WORDS, companies)]
    places = rng.sample(range(MOST_FIGURES), figures)
    stated = [(KINDS[place % len(KINDS)], PERIODS[place // len(KINDS)]) for place in places]
    values: dict[tuple[str, Figure], int] = {}
    for number, figure in enumerate(stated):
        numbers = rng.sample(range(figure[0].low, figure[0].high + 1), companies)
        if number < equal:
            same, other = rng.sample(range(companies), 2)
            numbers[same] = numbers[other]
        values |= {(company, figure): value for company, value in zip(names, numbers, strict=True)}
    text = "\n\n".join(_report(rng, number, name, stated, values) for number, name in enumerate(names, start=1))
    return Reports(names, stated, values, text)


def _report(rng: Random, number: int, company: str, figures: Sequence[Figure], values: dict[tuple[str, Figure], int]) -> str:
    sentences = [
        rng.choice(kind.sentences).format(company=company, period=period, figure=values[company, (kind, period)])
        for kind, period in rng.sample(figures, len(figures))
    ]
    return f"Document {number}: the report of {company}\n\n{' '.join(sentences)}"
