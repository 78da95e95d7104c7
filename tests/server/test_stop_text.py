"""Where an answer ends by its text: stop strings of several tokens, characters of several bytes."""

from __future__ import annotations

import pytest
import torch

from specache.server.penalties import RepeatPenalties
from specache.server.stop_criterion import TextEnds
from specache.templates.answer_text import AnswerText
from tests.server.tiny_server import END, TOKENIZER


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def ends_at(text: str, *stops: str) -> int | None:
    """The number of tokens after which the criterion ends a text."""
    criterion = TextEnds(lambda: AnswerText(TOKENIZER, stops), 1, [END])
    tokens = ids(text)
    for count in range(1, len(tokens) + 1):
        if criterion(torch.tensor([tokens[:count]]), None).item():
            return count
    return None


@pytest.mark.parametrize(
    ("text", "stops", "tokens"),
    [
        ("one STOP two", ["STOP"], 8),
        ("one STOP two", ["P t", "never"], 10),
        ("ab€cd", ["€"], 5),
        ("ab€cd", ["b€c"], 6),
        ("😀😀x", ["😀x"], 9),
        ("aaab", ["aab"], 4),
        ("abc", ["x"], None),
        ("abc", ["abcd"], None),
    ],
)
def test_an_answer_ends_with_the_last_token_of_a_stop_string(text, stops, tokens):
    assert ends_at(text, *stops) == tokens


def test_rows_end_apart_and_stay_ended():
    criterion = TextEnds(lambda: AnswerText(TOKENIZER, ["b"]), 2, [END])
    rows = [ids("abcd"), ids("aaab")]
    ended = [criterion(torch.tensor([row[:count] for row in rows]), None).tolist() for count in range(1, 5)]
    assert ended == [[False, False], [True, False], [True, False], [True, True]]


def test_a_streamed_text_is_the_whole_one_and_never_part_of_a_stop_string():
    text = AnswerText(TOKENIZER, ["STOP"])
    pieces = ["".join(piece for _, piece in text.push(token)) for token in ids("é STO €STOP x")]
    assert "".join(pieces) == "é STO €" and text.ended
    assert "�" not in "".join(pieces)


def test_penalties_follow_openais_formula():
    scores = torch.zeros(2, 6)
    input_ids = torch.tensor([[3, 3, 1, 1, 2], [3, 3, 4, 4, 4]])
    out = RepeatPenalties(2, presence=0.5, frequency=0.25)(input_ids, scores)
    assert out.tolist() == [[0, -1.0, -0.75, 0, 0, 0], [0, 0, 0, 0, -1.25, 0]]
    assert scores.eq(0).all()
    assert RepeatPenalties(5, 0.5, 0.25)(input_ids, scores).eq(0).all()
