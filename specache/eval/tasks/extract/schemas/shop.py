"""A shop's catalogue: articles with price, stock and shelf."""

from __future__ import annotations

from random import Random

from specache.eval.tasks.extract.schemas.base import Record, Schema
from specache.eval.tasks.extract.schemas.vocabulary import FILLERS, drawn_from

_material = drawn_from(
    "brass copper pewter walnut oak cedar birch ivory glass marble linen woollen leather wicker iron steel silver ceramic "
    "cork slate enamel bamboo velvet canvas bronze porcelain rubber maple granite tin felt straw"
)
_article = drawn_from(
    "kettle lantern stool ladle bucket mirror tray bowl candlestick clock comb basket bench chest jug funnel hammer "
    "inkwell lamp mortar pitcher plate rake saddle scale shelf sieve spoon tankard thimble trowel vase whistle bellows "
    "cradle easel goblet hinge kite ladder mallet napkin ring paddle quilt rug slipper teapot umbrella wheelbarrow "
    "xylophone birdcage bookend coaster doorstop eggcup flask gong hatbox"
)


def _record(rng: Random) -> Record:
    return {
        "article": f"{_material(rng)} {_article(rng)}",
        "price": rng.randint(2, 480),
        "stock": rng.randint(3, 900),
        "shelf": f"{rng.choice('ABCDEFGHJKLM')}{rng.randint(1, 24)}",
    }


CATALOGUE = Schema(
    name="catalogue",
    things="articles for sale",
    fields={
        "article": "what is sold",
        "price": "in shillings, a number",
        "stock": "pieces in stock, a number",
        "shelf": "where it stands",
    },
    title="Catalogue of the house of {person}, with remarks for the staff",
    record=_record,
    introductions=(
        "The {article} sells at {price} shillings.",
        "New this season is the {article}, which stands on shelf {shelf}.",
        "For {price} shillings a customer gets the {article}, kept on shelf {shelf}.",
        "We hold {stock} pieces of the {article}.",
        "Of the {article} there are {stock} left, at {price} shillings each.",
        "Many ask for the {article}; look for it on shelf {shelf}.",
        "The {article} is offered again, and its price is {price} shillings.",
        "A customer who wants the {article} will find {stock} pieces on shelf {shelf}.",
    ),
    statements=(
        "One pays {price} shillings for the {article}.",
        "Anyone who takes the {article} home leaves {price} shillings at the till.",
        "The price of the {article} was set at {price} shillings.",
        "At the last count there were {stock} pieces of the {article}.",
        "The store room holds the {article} in a quantity of {stock}.",
        "Of the {article} we can deliver {stock} at once.",
        "The {article} has its place on shelf {shelf}.",
        "To fetch the {article}, go to shelf {shelf}.",
        "Shelf {shelf} is where the {article} is kept.",
    ),
    repetitions=(
        "As said, the {article} goes for {price} shillings.",
        "To repeat it for the new clerk: {price} shillings buy the {article}.",
        "The count of the {article} was checked once more and {stock} is right.",
        "There really are {stock} pieces of the {article}, as was noted.",
        "Remember that shelf {shelf} is the one with the {article}.",
        "Whoever still looks for the {article} should try shelf {shelf}, as before.",
    ),
    corrections={
        "price": (
            "The price given above for the {key} is wrong: it is {new}.",
            "Correction: the {key} costs {new} shillings, not {old}.",
            "Since printing, the {key} has gone from {old} to {new} shillings.",
        ),
        "stock": (
            "The number of pieces given above for the {key} is wrong: it is {new}.",
            "Correction: there are {new} pieces of the {key}, not {old}.",
            "A recount of the {key} found {new} where {old} had been written.",
        ),
        "shelf": (
            "The shelf given above for the {key} is wrong: it is {new}.",
            "Correction: the {key} is on shelf {new}, not {old}.",
            "The {key} has moved from shelf {old} to shelf {new}.",
        ),
    },
    fillers=(
        *FILLERS,
        "Orders by post are packed on {weekday} by {person}.",
        "Customers who come by {place} are asked to wipe their boots.",
        "{person} once returned {object} and was given credit.",
        "Parcels for {place} go with the {weekday} cart.",
        "The paper for wrapping comes from {person} and is not for sale.",
        "Accounts are settled on {weekday}, unless {other} says otherwise.",
        "A clerk called {person} has the keys of the cellar on {weekday}.",
        "Complaints go to {person}, who is rarely in.",
    ),
)
