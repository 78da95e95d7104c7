"""Write HTML pages with tables among what else is on a page: menus, other tables, comments."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from random import Random

from specache.eval.tasks.retrieval import ADJECTIVES, NOUNS
from specache.eval.tasks.table.topics import Topic

_MENU = ("Home", "News", "Offers", "Journal", "Contact", "Careers", "Press", "Help", "Account", "Privacy")
_NOISE_LINES = 6  # most lines of one section that is not asked for


def write_page(rng: Random, topic: Topic, rows: Sequence[Sequence[str]], *, tables: int, noise: int) -> str:
    """Return a page with the rows in `tables` tables, and `noise` lines of other content.

    The other content is spread over the places between the tables, before and after them.
    """
    site = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}".title()
    parts = [_head(rng, site, topic)]
    before = 0
    for number in range(tables + 1):
        until = noise * (number + 1) // (tables + 1)
        parts += _noise(rng, until - before)
        before = until
        if number < tables:
            share = rows[len(rows) * number // tables : len(rows) * (number + 1) // tables]
            parts.append(_table(rng, topic, share, number + 1))
    parts.append(f'<footer class="site-footer"><p>&copy; 2024 {escape(site)}. All rights reserved.</p></footer>\n</body>\n</html>')
    return "\n".join(parts)


def _head(rng: Random, site: str, topic: Topic) -> str:
    links = "".join(f'<li class="nav-item"><a href="/{name.lower()}">{name}</a></li>' for name in rng.sample(_MENU, 4))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(site)} | {topic.name.title()}</title>\n'
        f'<link rel="stylesheet" href="/static/main.{_hash(rng)}.css">\n</head>\n'
        f'<body class="page page-{topic.name}">\n<nav class="site-nav"><ul>{links}</ul></nav>'
    )


def _table(rng: Random, topic: Topic, rows: Sequence[Sequence[str]], number: int) -> str:
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in topic.columns)
    lines = [
        f'<section id="{topic.name}-{number}" class="list">\n<h2>{topic.name.title()}, part {number}</h2>',
        f'<table class="grid {topic.name}">\n<thead><tr>{titles}</tr></thead>\n<tbody>',
    ]
    for place, (name, *cells) in enumerate(rows):
        key = rng.randint(10_000, 99_999)
        first = f'<td class="name"><a href="/{topic.name}/{key}">{escape(name)}</a></td>'
        others = "".join(_cell(rng, cell) for cell in cells)
        lines.append(f'<tr class="{("odd", "even")[place % 2]}" data-id="{key}">{first}{others}</tr>')
    lines.append("</tbody>\n</table>\n</section>")
    return "\n".join(lines)


def _cell(rng: Random, text: str) -> str:
    inside = escape(text)
    if rng.random() < 0.2:
        inside = f'<span class="{rng.choice(("v", "val", "txt"))}">{inside}</span>'
    return f"<td>{inside}</td>" if rng.random() < 0.8 else f'<td class="c{rng.randint(1, 9)}">{inside}</td>'


def _noise(rng: Random, lines: int) -> list[str]:
    """Return sections of other content with `lines` lines in total."""
    sections = []
    while lines > 0:
        count = min(lines, rng.randint(2, _NOISE_LINES))
        sections.append(rng.choice((_comments, _rates, _teasers))(rng, count))
        lines -= count
    return sections


def _comments(rng: Random, count: int) -> str:
    lines = [
        f'<li class="comment" data-likes="{rng.randint(0, 99)}"><b>{rng.choice(ADJECTIVES)}_{rng.choice(NOUNS)}</b>: '
        f"{_sentence(rng)}</li>"
        for _ in range(count)
    ]
    return "\n".join(['<aside class="comments">\n<h3>Latest comments</h3>\n<ul>', *lines, "</ul>\n</aside>"])


def _rates(rng: Random, count: int) -> str:
    lines = [
        f"<tr><td>Zone {rng.choice('ABCDEFGH')}{rng.randint(1, 9)}</td><td>{rng.randint(1, 30)} kg</td>"
        f"<td>${rng.randint(2, 60)}.{rng.randint(0, 99):02d}</td></tr>"
        for _ in range(count)
    ]
    head = '<table class="rates">\n<thead><tr><th>Zone</th><th>Weight</th><th>Fee</th></tr></thead>\n<tbody>'
    return "\n".join([f'<section class="info">\n<h3>Shipping rates</h3>\n{head}', *lines, "</tbody>\n</table>\n</section>"])


def _teasers(rng: Random, count: int) -> str:
    lines = [
        f'<div class="teaser" id="t{_hash(rng)}"><img src="/img/{_hash(rng)}.jpg" alt=""><p>{_sentence(rng)}</p></div>'
        for _ in range(count)
    ]
    return "\n".join(['<div class="teasers">', *lines, "</div>"])


def _sentence(rng: Random) -> str:
    first, second = rng.sample(NOUNS, 2)
    return f"The {rng.choice(ADJECTIVES)} {first} and the {second} are {rng.choice(ADJECTIVES)} this season."


def _hash(rng: Random) -> str:
    return f"{rng.getrandbits(24):06x}"
