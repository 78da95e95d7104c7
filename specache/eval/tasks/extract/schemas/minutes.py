"""Minutes of meetings: tasks with the person who does them and the day they are due."""

from __future__ import annotations

from random import Random

from specache.eval.tasks.extract.schemas.base import Record, Schema
from specache.eval.tasks.extract.schemas.vocabulary import FILLERS, day, drawn_from, person

_verb = drawn_from("repair paint measure inspect clean insure replace sketch photograph survey catalogue move lock restore value")
_thing = drawn_from(
    "north gate|reading room|harbour stairs|bell tower|lending library|fire engine|rose garden|weather vane|boat shed|"
    "village pump|main staircase|piano|kitchen stove|town archive|footbridge|south wall|cellar door|notice board|"
    "stage curtain|greenhouse|drinking fountain|chimney|bicycle stand|map cabinet|flagpole|billiard table|attic window|"
    "guest room|tool shed|hen house|stone steps|ticket booth|side chapel|coal store|projector|rain gutter|west porch|"
    "ballot box|telescope|water tank",
    "|",
)


def _record(rng: Random) -> Record:
    return {"task": f"{_verb(rng)} the {_thing(rng)}", "person": person(rng), "due": day(rng)}


MINUTES = Schema(
    name="minutes",
    things="tasks that were agreed on",
    fields={"task": "what is to be done", "person": "who does it", "due": "the day by which it is done"},
    title="Minutes of the meetings of the society, kept by {person}",
    record=_record,
    introductions=(
        "It was agreed to {task}; {person} will see to it.",
        "{person} offered to {task}.",
        "The members voted to {task}, and want this done by {due}.",
        "After some debate it was settled to {task} not later than {due}.",
        "{person} was asked to {task} by {due}.",
        "On the motion to {task} there was no objection, and {person} took it on.",
        "Somebody must {task}, and {due} was named as the last day for it.",
    ),
    statements=(
        "The one who is going to {task} is {person}.",
        "The duty to {task} falls to {person}.",
        "It is {person} who promised to {task}.",
        "For the resolve to {task} the date is {due}.",
        "The work to {task} has to be finished on {due}.",
        "There is time until {due} to {task}.",
    ),
    repetitions=(
        "The secretary noted again that {person} is to {task}.",
        "Asked once more who would {task}, the chair pointed to {person}.",
        "The plan to {task} was mentioned again, with {due} as its day.",
        "The chair repeated that it has to be {due} for the plan to {task}.",
    ),
    corrections={
        "person": (
            "The name given above for the plan to {key} is wrong: it is {new}.",
            "Correction: not {old} but {new} is going to {key}.",
            "{old} has withdrawn, so that {new} will {key}.",
        ),
        "due": (
            "The date given above for the plan to {key} is wrong: it is {new}.",
            "Correction: the day by which to {key} is {new}, not {old}.",
            "The deadline to {key} was moved from {old} to {new}.",
        ),
    },
    fillers=(
        *FILLERS,
        "The meeting of {weekday} was opened by {person}.",
        "{person} sent apologies on account of {weather}.",
        "Coffee was served by {person}, and the window was shut against {weather}.",
        "{other} asked for a show of hands, and the matter was dropped.",
        "The treasurer read a long statement, during which {person} fell asleep.",
        "{person} thanked {other} for the flowers.",
        "The debate about {place} was put off to another {weekday}.",
        "{person} wondered whether {place} belongs to the society at all.",
    ),
)
