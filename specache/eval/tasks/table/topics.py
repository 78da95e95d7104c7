"""What the tables of a page are about: their columns, and rows of random values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from specache.eval.tasks.retrieval import ADJECTIVES, NOUNS

_TEXTS = {
    "cities": "Aarhus Bergen Bilbao Bologna Brno Cork Delft Dijon Espoo Galway Gdansk Ghent Graz Leipzig Lille Linz Lucca Lund "
    "Malaga Mannheim Nantes Oulu Padua Porto Riga Seville Split Tartu Turku Utrecht Verona York",
    "countries": "Austria Chile Denmark Estonia France Greece Italy Japan Kenya Latvia Mexico Norway Peru Poland Spain Vietnam",
    "first names": "Ada Bruno Clara Dario Edith Felix Greta Hugo Ines Jonas Karin Leo Mara Nils Olga Pavel Rosa Simon Tilda Viktor",
    "last names": "Almeida Berger Castell Dorn Eriksen Fuchs Gallo Hansen Ivanov Jansen Keller Lindqvist Moreau Novak Okafor "
    "Petrov Quist Rossi Santos Tanaka Ueda Vogel Weber Zeman",
    "brands": "Alpenrose Borealis Casanova Dunmore Everline Fjordly Granit Halcyon Ironbark Juniper Kestrel Lumen Meridian Nordhus",
    "genres": "Adventure Comedy Crime Documentary Drama Fantasy Horror Musical Mystery Romance Thriller Western",
    "roles": "Accountant Analyst Architect Baker Carpenter Chemist Designer Editor Engineer Gardener Librarian Nurse Welder",
}
_WORDS = {kind: text.split() for kind, text in _TEXTS.items()}
_CONTRACTS = ("full time", "part time", "temporary", "internship", "freelance")


@dataclass(frozen=True)
class Topic:
    """A kind of list.

    Attributes:
        name: also in the page's addresses and classes.
        things: what one row is, in the plural.
        columns: their titles. The first names the row.
        title: (random numbers, a name that is unique on the page) -> the first cell.
        cells: random numbers -> the other cells.
    """

    name: str
    things: str
    columns: tuple[str, ...]
    title: Callable[[Random, str], str]
    cells: Callable[[Random], list[str]]

    def rows(self, rng: Random, count: int) -> list[list[str]]:
        """Make rows whose first cells differ.

        `count` can be at most `MOST_ROWS`.
        """
        names = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
        rows = []
        for adjective, noun in (divmod(name, len(NOUNS)) for name in names):
            name = f"{ADJECTIVES[adjective]} {NOUNS[noun]}".title()
            rows.append([self.title(rng, name), *self.cells(rng)])
        return rows


MOST_ROWS = len(ADJECTIVES) * len(NOUNS)


def _product(rng: Random, name: str) -> str:
    return f"{name} & {rng.choice(NOUNS).title()}" if rng.random() < 0.1 else name


def _product_cells(rng: Random) -> list[str]:
    price = f"${rng.randint(3, 480)}.{rng.randint(0, 99):02d}"
    return [_word(rng, "brands"), price, str(rng.randint(0, 999)), f"{rng.randint(10, 50) / 10}", _word(rng, "countries")]


def _film_cells(rng: Random) -> list[str]:
    minutes = f"{rng.randint(61, 199)} min"
    return [_person(rng), str(rng.randint(1931, 2024)), minutes, _word(rng, "genres"), f"{rng.randint(10, 99) / 10}"]


def _job(rng: Random, name: str) -> str:
    return f"{_word(rng, 'roles')} ({name})"


def _job_cells(rng: Random) -> list[str]:
    posted = f"2024-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    salary = f"{rng.randint(24, 98)},{rng.randint(0, 9)}00 EUR"
    return [
        f"{_word(rng, 'last names')} & {_word(rng, 'last names')}",
        _word(rng, "cities"),
        salary,
        rng.choice(_CONTRACTS),
        posted,
    ]


def _hotel_cells(rng: Random) -> list[str]:
    phone = f"+{rng.randint(30, 59)} {rng.randint(100, 999)} {rng.randint(1000, 9999)}"
    return [_word(rng, "cities"), str(rng.randint(1, 5)), str(rng.randint(8, 420)), f"{rng.randint(41, 389)} EUR", phone]


def _word(rng: Random, kind: str) -> str:
    return rng.choice(_WORDS[kind])


def _person(rng: Random) -> str:
    return f"{_word(rng, 'first names')} {_word(rng, 'last names')}"


TOPICS = {
    topic.name: topic
    for topic in (
        Topic("products", "products", ("Name", "Brand", "Price", "Stock", "Rating", "Origin"), _product, _product_cells),
        Topic(
            *("films", "films", ("Title", "Director", "Year", "Length", "Genre", "Score")),
            lambda rng, name: f"The {name}",
            _film_cells,
        ),
        Topic("jobs", "jobs", ("Position", "Employer", "City", "Salary", "Contract", "Posted"), _job, _job_cells),
        Topic(
            *("hotels", "hotels", ("Hotel", "City", "Stars", "Rooms", "Price per night", "Phone")),
            lambda rng, name: f"{name} Inn",
            _hotel_cells,
        ),
    )
}
