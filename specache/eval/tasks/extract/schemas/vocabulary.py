"""Words that all schemas draw from: persons, days, weather, and sentences that fit any document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random


def drawn_from(words: str, separator: str | None = None) -> Callable[[Random], str]:
    """Return a function that draws one of the words."""
    listed = words.split(separator)
    return lambda rng: rng.choice(listed)


_first_name = drawn_from(
    "Ada Albin Alma Amos Anselm Bela Bertha Bruno Cecil Clara Conrad Cora Dagny Dora Edgar Edith Elsa Emil Enid Esther "
    "Felix Flora Frida Gerda Gideon Greta Gustav Hanna Hector Hilda Hugo Ida Ignaz Irma Isak Ivor Jonas Judith Karin "
    "Konrad Lars Leona Linus Lydia Magnus Malin Martha Milo Nadia Nora Olaf Otto Paula Petra Ragnar Rosa Rufus Selma Signe "
    "Silas Tabea Thea Tobias Ulla Ursula Vera Viktor Wanda Willem Ylva"
)
_last_name = drawn_from(
    "Abbott Ahlgren Barlow Becker Bergman Bolton Brandt Calder Carver Colby Corbin Dahl Darrow Dietz Eklund Ellery Engel "
    "Farrow Fenner Forsberg Garner Gessner Glover Hadley Hale Hartmann Holm Ingram Jarrow Jensen Kessler Kirby Lambert "
    "Lindgren Lorenz Marlow Mercer Moberg Nagel Norling Oakes Osborn Palmer Pettersen Quist Ramsey Reuter Ridley Sander "
    "Selby Sommer Strand Tanner Thorne Unger Vance Vogel Walden Wexler Winter Yates Zeller"
)
_month = drawn_from("January February March April May June July August September October November December")
_weekday = drawn_from("Monday Tuesday Wednesday Thursday Friday Saturday")
_weather = drawn_from(
    "rain|a thin fog|a light frost|wind from the west|bright sun|sleet|a heavy dew|thunder in the distance|low cloud|"
    "drizzle|an early thaw|a sharp east wind",
    "|",
)
_place = drawn_from(
    "the market square|the old bridge|the schoolhouse|the mill pond|the station|the upper road|the chapel yard|"
    "the ferry landing|the tannery|the brick kiln|the lower meadow|the town hall|the post office|the corn exchange|"
    "the bakery|the smithy",
    "|",
)
_object = drawn_from(
    "a lost umbrella|a crate of apples|an unsigned letter|a spare key|a torn map|a stray dog|a box of candles|"
    "a broken stool|a bundle of newspapers|a jar of pickled plums|a wet overcoat|a fiddle without strings|a basket of eggs|"
    "a pocket watch|a roll of canvas|a sack of walnuts",
    "|",
)

# sentences for any document
FILLERS = (
    "There was {weather} that {weekday}, and few people were about.",
    "{person} came in from {place} and asked for nothing in particular.",
    "Somebody had left {object} near {place}.",
    "On {weekday} the talk was mostly of {weather}.",
    "{person} and {other} sat by the window for a while.",
    "Nobody could say who owned {object} that stood in the passage.",
    "The road past {place} was closed on {weekday}, and carts went round by {other_place}.",
    "{person} told a long story about {object}, which nobody believed.",
    "A letter from {person} arrived on {weekday}, but it had no bearing on the matter.",
    "The clock at {place} was slow again, as {other} remarked.",
    "After {weather} in the morning it cleared up towards noon.",
    "{person} had walked all the way from {place} in spite of {weather}.",
    "{other} asked whether {object} might be kept here until {weekday}.",
    "It is said that {person} will move to a house near {place} before long.",
    "{person} was handed {object}, found behind {place}.",
    "Children were playing by {place}, and {other} sent them home.",
    "The lamp had to be lit early on {weekday} because of {weather}.",
    "{person} is still away, and {other} looks after the post.",
)


def person(rng: Random) -> str:
    """Draw a full name."""
    return f"{_first_name(rng)} {_last_name(rng)}"


def day(rng: Random) -> str:
    """Draw a day of the year: `12 May`."""
    return f"{rng.randint(1, 28)} {_month(rng)}"


WORDS: Mapping[str, Callable[[Random], str]] = {
    "person": person,
    "other": person,
    "weekday": _weekday,
    "weather": _weather,
    "place": _place,
    "other_place": _place,
    "object": _object,
}
