"""A land register: parcels with holder, acres, rent and year."""

from __future__ import annotations

from random import Random

from specache.eval.tasks.extract.schemas.base import Record, Schema
from specache.eval.tasks.extract.schemas.vocabulary import FILLERS, drawn_from, person

_first = drawn_from(
    "Long Broad Stony Crooked Hollow Upper Nether Fallow Gorse Heron Badger Willow Abbot Miller Shepherd Bishop Raven "
    "Thistle Bramble Clay Chalk Foxglove Hazel Juniper Lark Marsh Otter Plover Rook Swallow Tanner Withy Yarrow Alder "
    "Beacon Cuckoo"
)
_second = drawn_from(
    "Acre Meadow Furlong Croft Leys Piece Close Bottom Ridge Hanger Paddock Spinney Holt Slade Pightle Garth Ing Mead Shaw "
    "Strip Warren Toft Dell Field Green Hurst"
)


def _record(rng: Random) -> Record:
    return {
        "parcel": f"{_first(rng)} {_second(rng)}",
        "holder": person(rng),
        "acres": rng.randint(2, 95),
        "rent": rng.randint(3, 240),
        "year": rng.randint(1740, 1899),
    }


REGISTER = Schema(
    name="register",
    things="parcels of land",
    fields={
        "parcel": "its name",
        "holder": "who holds it",
        "acres": "its size, a number",
        "rent": "in shillings a year, a number",
        "year": "when it was entered, a number",
    },
    title="Register of the parish lands, written out by {person}",
    record=_record,
    introductions=(
        "The parcel called {parcel} is held by {holder}.",
        "{holder} has {parcel}, a piece of {acres} acres.",
        "Next comes {parcel}, entered in {year}.",
        "{parcel} measures {acres} acres.",
        "For {parcel} a rent of {rent} shillings is due.",
        "In {year} the clerk entered {parcel} under the name of {holder}.",
        "There is also {parcel}, with {acres} acres at {rent} shillings a year.",
    ),
    statements=(
        "The holder of {parcel} is {holder}.",
        "It is {holder} who farms {parcel}.",
        "The lease of {parcel} is in the name of {holder}.",
        "The surveyor gives {parcel} as {acres} acres.",
        "By the chain, {parcel} comes to {acres} acres.",
        "The size of {parcel} is {acres} acres.",
        "Every year {parcel} brings {rent} shillings.",
        "The rent of {parcel} stands at {rent} shillings.",
        "Whoever farms {parcel} pays {rent} shillings at Michaelmas.",
        "The entry for {parcel} dates from {year}.",
        "It was in {year} that {parcel} came into this book.",
        "The year written beside {parcel} is {year}.",
    ),
    repetitions=(
        "As the older book also says, {holder} sits on {parcel}.",
        "That {parcel} belongs to {holder} was confirmed by the vestry.",
        "Walked once more, {parcel} is {acres} acres indeed.",
        "The {acres} acres of {parcel} were never in doubt.",
        "The steward agrees that {rent} shillings come from {parcel}.",
        "Once more: {parcel} owes {rent} shillings.",
        "The vestry also has {year} for {parcel}.",
        "In the copy, too, {parcel} is put under {year}.",
    ),
    corrections={
        "holder": (
            "The holder given above for {key} is wrong: it is {new}.",
            "Correction: {key} is held by {new}, not {old}.",
            "{old} has given up {key}, and {new} holds it now.",
        ),
        "acres": (
            "The size given above for {key} is wrong: it is {new}.",
            "Correction: {key} has {new} acres, not {old}.",
            "A new survey of {key} found {new} acres instead of {old}.",
        ),
        "rent": (
            "The rent given above for {key} is wrong: it is {new}.",
            "Correction: {key} pays {new} shillings, not {old}.",
            "The rent of {key} was changed from {old} to {new} shillings.",
        ),
        "year": (
            "The year given above for {key} is wrong: it is {new}.",
            "Correction: {key} was entered in {new}, not {old}.",
            "The date of {key} was misread as {old}; the book has {new}.",
        ),
    },
    fillers=(
        *FILLERS,
        "The hedge along {place} is to be laid by {person}.",
        "{person} keeps bees near {place} and pays nothing for it.",
        "A dispute between {person} and {other} about a ditch was settled on {weekday}.",
        "The tithe barn by {place} lost its roof to {weather}.",
        "{person} wrote this page by candle light after {weather}.",
        "The footpath from {place} to {other_place} is open to all.",
        "{other} claims that a boundary stone was moved, but no one saw it.",
        "The sexton, {person}, asked for a new spade.",
    ),
)
