"""A harbour's log, written as prose: ships with cargo and berth."""

from __future__ import annotations

from random import Random

from specache.eval.tasks.extract.schemas.base import Record, Schema
from specache.eval.tasks.extract.schemas.vocabulary import FILLERS, drawn_from

_first = drawn_from(
    "Grey Silent Golden Northern Crimson Wandering Lucky Patient Merry Stormy Amber Faithful Noble Distant Swift Emerald "
    "Humble Lonely Gallant Restless Sapphire Proud Gentle Daring Ancient Scarlet Hopeful Royal Velvet Winged"
)
_second = drawn_from(
    "Heron Petrel Maiden Dolphin Star Venture Gull Compass Lantern Otter Falcon Widow Anchor Swan Mermaid Horizon "
    "Cormorant Pilgrim Marigold Tempest Juno Minstrel Plover Sturgeon Thistle Walrus Zephyr Countess Puffin Trident"
)
_cargo = drawn_from(
    "barley|salted herring|raw cotton|roof tiles|pine tar|coffee|tin ore|oranges|wool|gunpowder|lamp oil|cane sugar|"
    "dried cod|sawn timber|coal|black tea|window glass|hemp rope|olive oil|rye flour|slate|red wine|cork|copper wire|"
    "brown rice|candles|pepper|tobacco|linseed|marble blocks",
    "|",
)


def _record(rng: Random) -> Record:
    return {"ship": f"{_first(rng)} {_second(rng)}", "cargo": _cargo(rng), "berth": rng.randint(1, 64)}


HARBOUR_LOG = Schema(
    name="log",
    things="ships that came in",
    fields={"ship": "its name", "cargo": "what it carries", "berth": "where it lies, a number"},
    title="Log of the harbour office, in the hand of {person}",
    record=_record,
    introductions=(
        "At first light the {ship} came in and made fast at berth {berth}.",
        "The {ship} was sighted off the point, laden with {cargo}.",
        "We sent the pilot out to the {ship}, and she lies at berth {berth} now.",
        "The {ship} arrived with {cargo} in her hold.",
        "With the tide came the {ship}, carrying {cargo}.",
        "Towards evening the {ship} was warped to berth {berth}.",
    ),
    statements=(
        "The hold of the {ship} is full of {cargo}.",
        "The {ship} brings {cargo}, by her papers.",
        "What the {ship} carries is {cargo}.",
        "The {ship} was given berth {berth}.",
        "To visit the {ship} one goes to berth {berth}.",
        "Berth {berth} is taken by the {ship}.",
    ),
    repetitions=(
        "Customs opened the {ship} and saw {cargo}, as declared.",
        "As written before, it is {cargo} that the {ship} has on board.",
        "The night watch, too, found the {ship} at berth {berth}.",
        "Lines of the {ship} were doubled, still at berth {berth}.",
    ),
    corrections={
        "cargo": (
            "The cargo given above for the {key} is wrong: it is {new}.",
            "Correction: the {key} carries {new}, not {old}.",
            "The papers of the {key} were misread; they say {new} and not {old}.",
        ),
        "berth": (
            "The berth given above for the {key} is wrong: it is {new}.",
            "Correction: the {key} lies at berth {new}, not {old}.",
            "The {key} was towed from berth {old} to berth {new}.",
        ),
    },
    fillers=(
        *FILLERS,
        "The glass fell on {weekday}, and {weather} followed.",
        "{person} had the watch from midnight and saw nothing.",
        "A rowing boat with {person} and {other} went over to {place}.",
        "The crane stood idle on {weekday} because of {weather}.",
        "{person} paid the harbour dues of last month.",
        "The foghorn was tested, to the annoyance of {other}.",
        "A sailor called {person} was looking for {object}.",
        "The buoy beyond {place} has to be painted before {weekday}.",
    ),
)
