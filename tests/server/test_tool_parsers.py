"""Calls in an answer are found however it is written and cut, and nothing of it is lost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.server.answer_parser import AnswerParser, ChatContext
from specache.server.answer_pieces import AnswerPiece, ReasoningPiece, TextPiece, ToolArguments, ToolCallBegin
from specache.server.tool_fields import ToolDefinition
from specache.server.tool_formats.base import ToolFormat
from specache.server.tool_formats.generic import GenericFormat
from specache.server.tool_formats.hermes import HermesFormat
from specache.server.tool_formats.known_formats import FORMATS, tool_format
from specache.server.tool_formats.llama3 import Llama3Format
from specache.server.tool_formats.mistral import MistralFormat
from specache.server.tool_use import ToolUse
from tests.server.tool_models import FAMILIES

HERMES, LLAMA, MISTRAL = HermesFormat(), Llama3Format(), MistralFormat(False, False)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
ULM = ("weather", '{"city": "Ulm"}')
TRICKY = json.dumps(
    {"city": 'a "}</tool_call> [TOOL_CALLS] {"name": \\ <|python_tag|> ä 😀', "list": [{"x": []}, "]}"]}, ensure_ascii=False
)


def tools(*names: str, parallel: bool = True) -> ToolUse:
    found = [
        ToolDefinition.model_validate({"type": "function", "function": {"name": name}}) for name in names or ("weather", "time")
    ]
    made = ToolUse.of(found, "auto", parallel)
    assert made is not None
    return made


def parsed(form: ToolFormat, pieces: list[str], use: ToolUse | None = None) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls of an answer that arrives in these pieces."""
    parser = form.parser(use or tools())
    assert parser is not None
    found: list[AnswerPiece] = []
    for piece in pieces:
        if not parser.ended:
            found += parser.push(piece)
    return collected([*found, *parser.finish()])


def collected(pieces: list[AnswerPiece]) -> tuple[str, list[tuple[str, str]]]:
    text, calls = "", []
    for piece in pieces:
        if isinstance(piece, TextPiece):
            text += piece.text
        elif isinstance(piece, ToolCallBegin):
            assert piece.index == len(calls) and piece.call_id
            calls.append((piece.name, ""))
        elif isinstance(piece, ToolArguments):
            assert piece.index == len(calls) - 1 and piece.text
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return text, calls


ANSWERS = {
    "hermes": (HERMES, CALL, "", [ULM]),
    "hermes, text in front": (HERMES, f"Let me look.\n{CALL}", "Let me look.", [ULM]),
    "hermes, text behind": (HERMES, f"{CALL}\nThat is it.", "That is it.", [ULM]),
    "hermes, text on both sides": (HERMES, f"Look: {CALL} Done.", "Look: Done.", [ULM]),
    "hermes, two": (HERMES, f"{CALL}\n{CALL}", "", [ULM, ULM]),
    "hermes, two without space": (HERMES, f"{CALL}{CALL}", "", [ULM, ULM]),
    "hermes, tricky strings": (HERMES, CALL.replace('{"city": "Ulm"}', TRICKY), "", [("weather", TRICKY)]),
    "hermes, arguments first": (
        HERMES,
        '<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>',
        "",
        [("time", '{"a": 1}')],
    ),
    "hermes, no arguments": (HERMES, '<tool_call>{"name": "time"}</tool_call>', "", [("time", "{}")]),
    "hermes, arguments as text": (
        HERMES,
        '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("time", '{"a": 1}')],
    ),
    "hermes, more fields": (HERMES, '<tool_call>{"name": "time", "arguments": {}, "id": "}"}</tool_call>', "", [("time", "{}")]),
    "hermes, the end forgotten": (HERMES, '<tool_call>{"name": "time", "arguments": {}', "", [("time", "{}")]),
    "hermes, a brace forgotten": (
        HERMES,
        f'<tool_call>{{"name": "time", "arguments": {{}}</tool_call>\n{CALL}',
        "",
        [("time", "{}"), ULM],
    ),
    "hermes, cut in the arguments": (HERMES, CALL[:57], "", [("weather", '{"city": "Ul')]),
    "hermes, cut in the marker behind it": (HERMES, CALL[:-4], "", [ULM]),
    "hermes, cut in the name": (HERMES, CALL[:25], CALL[:25], []),
    "hermes, another tool": (HERMES, CALL.replace("weather", "rm"), CALL.replace("weather", "rm"), []),
    "hermes, no JSON": (HERMES, "<tool_call>\nweather(Ulm)\n</tool_call>", "<tool_call>\nweather(Ulm)\n</tool_call>", []),
    "hermes, broken JSON": (HERMES, '<tool_call>{"name": weather}</tool_call>!', '<tool_call>{"name": weather}</tool_call>!', []),
    "hermes, broken then whole": (HERMES, '<tool_call>{"name": </tool_call>' + CALL, '<tool_call>{"name": </tool_call>', [ULM]),
    "hermes, swallowed": (HERMES, '<tool_call>{"a' + CALL, '<tool_call>{"a', [ULM]),
    "hermes, half a marker": (HERMES, "a <tool_cal", "a <tool_cal", []),
    "hermes, only text": (HERMES, " plain {} [] text \n", " plain {} [] text \n", []),
    "llama": (LLAMA, '{"name": "weather", "parameters": {"city": "Ulm"}}', "", [ULM]),
    "llama, two": (
        LLAMA,
        '{"name": "time", "parameters": {}}; {"name": "weather", "parameters": {"city": "Ulm"}}',
        "",
        [("time", "{}"), ULM],
    ),
    "llama, with its type": (LLAMA, '{"type": "function", "name": "time", "parameters": {}}', "", [("time", "{}")]),
    "llama, tagged": (LLAMA, '<|python_tag|>{"name": "weather", "parameters": {"city": "Ulm"}}', "", [ULM]),
    "llama, text and tag": (LLAMA, 'Sure. <|python_tag|>{"name": "time", "parameters": {}}', "Sure.", [("time", "{}")]),
    "llama, its own tool": (LLAMA, '<|python_tag|>search.call(query="a")', '<|python_tag|>search.call(query="a")', []),
    "llama, an object that is an answer": (LLAMA, '{"result": {"name": "time"}}', '{"result": {"name": "time"}}', []),
    "llama, an object with a name": (LLAMA, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    "llama, an object behind text": (LLAMA, 'So: {"name": "time", "parameters": {}}', 'So: {"name": "time", "parameters": {}}', []),
    "llama, tricky strings": (LLAMA, f'{{"name": "weather", "parameters": {TRICKY}}}', "", [("weather", TRICKY)]),
    "mistral": (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}}]', "", [ULM]),
    "mistral, two": (
        MISTRAL,
        '[TOOL_CALLS][{"name": "time", "arguments": {}, "id": "abcdefghi"}, {"name": "time", "arguments": {}}]',
        "",
        [("time", "{}")] * 2,
    ),
    "mistral, by name": (
        MISTRAL,
        '[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}[TOOL_CALLS]time[CALL_ID]a1b2c3d4e[ARGS]{}',
        "",
        [ULM, ("time", "{}")],
    ),
    "mistral, text in front": (MISTRAL, 'Look. [TOOL_CALLS] [{"name": "time", "arguments": {}}]', "Look.", [("time", "{}")]),
    "mistral, by another name": (MISTRAL, '[TOOL_CALLS]rm[ARGS]{"a": 1}', '[TOOL_CALLS]rm[ARGS]{"a": 1}', []),
    "mistral, an empty list": (MISTRAL, "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
    "mistral, tricky strings": (MISTRAL, f"[TOOL_CALLS]weather[ARGS]{TRICKY}", "", [("weather", TRICKY)]),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_calls_are_found_and_the_rest_is_text(case):
    form, answer, text, calls = ANSWERS[case]
    assert parsed(form, [answer]) == (text, calls)


@pytest.mark.parametrize("case", ANSWERS)
def test_it_makes_no_difference_how_an_answer_is_cut(case):
    form, answer, text, calls = ANSWERS[case]
    assert parsed(form, list(answer)) == (text, calls)
    for cut in range(1, len(answer)):
        assert parsed(form, [answer[:cut], answer[cut:]]) == (text, calls), cut


ALPHABET = st.sampled_from(
    (
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "', "weather", '", "arguments": '),
        *('"parameters": ', "{", "}", "[", "]", '"', "\\", ",", ":", " ", "\n", "time", "a", "1", "ä", ";", "{}"),
    )
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([HERMES, LLAMA, MISTRAL]), st.lists(ALPHABET, max_size=30), st.data())
def test_any_text_in_any_pieces_gives_the_same_and_never_fails(form, parts, data):
    answer = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=6)))
    whole = parsed(form, [answer])
    assert whole[1] or whole[0] == answer  # nothing is lost where nothing is called
    assert parsed(form, [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]) == whole
    assert parsed(form, list(answer)) == whole


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.characters(exclude_characters="<[{", exclude_categories=["Cs"])), st.sampled_from([HERMES, LLAMA, MISTRAL])
)
def test_text_without_a_marker_comes_back_as_it_is(text, form):
    assert parsed(form, [text]) == (text, [])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["</tool_call>", '"}', "[TOOL_CALLS]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8), JSON, max_size=4),
    st.sampled_from(["hermes", "llama3", "mistral", "mistral_named", "harmony"]),
    st.booleans(),
)
def test_arguments_come_back_whatever_they_hold(arguments, name, ascii_only):
    family = FAMILIES[name]
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    text, calls = answered(family.tokenizer, family.written(("weather", written)))
    assert (text, calls) == ("", [("weather", written)])


def answered(tokenizer, answer: str, stops: tuple[str, ...] = (), prompt: str = "", use: ToolUse | None = None):
    """Return the text and the calls of an answer as the model's tokens spell it."""
    return collected(pieces_of(tokenizer, answer, stops, prompt, use))


def pieces_of(
    tokenizer, answer: str, stops: tuple[str, ...] = (), prompt: str = "", use: ToolUse | None = None
) -> list[AnswerPiece]:
    form = tool_format(tokenizer)
    if form.name == "harmony":
        prompt = prompt or "<|start|>assistant"
    chat = ChatContext(tokenizer(prompt, add_special_tokens=False)["input_ids"], form, use or tools())
    parser = AnswerParser(tokenizer, stops, chat)
    pieces: list[AnswerPiece] = []
    for token in tokenizer(answer, add_special_tokens=False)["input_ids"]:
        pieces += parser.push(token)
    return [*pieces, *parser.finish()]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_recognised_by_its_template_and_its_calls_are_found(name):
    family = FAMILIES[name]
    assert tool_format(family.tokenizer).name == name.removesuffix("_named")
    calls = [ULM] if name == "harmony" else [ULM, ("time", "{}")]
    assert answered(family.tokenizer, family.written(*calls)) == ("", calls)


def test_every_format_has_a_model_here():
    assert {one.name for one in FORMATS} | {GenericFormat.name} == {
        tool_format(family.tokenizer).name for family in FAMILIES.values()
    }


def test_a_call_of_gpt_oss_may_name_its_tool_in_the_role():
    answer = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.time<|channel|>commentary json<|message|>{}<|call|>"
    )
    pieces = pieces_of(FAMILIES["harmony"].tokenizer, answer)
    assert collected(pieces) == ("", [("time", "{}")])
    assert "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece)) == "hm"


def test_a_call_of_gpt_oss_to_another_tool_is_reasoning():
    pieces = pieces_of(FAMILIES["harmony"].tokenizer, "<|channel|>commentary to=browser.search<|message|>{}<|call|>")
    assert pieces == [ReasoningPiece("{"), ReasoningPiece("}")]


def test_gpt_oss_may_call_without_arguments():
    answer = "<|channel|>commentary to=functions.time<|message|><|call|>"
    assert answered(FAMILIES["harmony"].tokenizer, answer) == ("", [("time", "{}")])


def test_arguments_stream_as_they_are_written():
    family = FAMILIES["hermes"]
    pieces = pieces_of(family.tokenizer, family.written(ULM))
    assert isinstance(pieces[0], ToolCallBegin) and len(pieces) == 1 + len(ULM[1])


def test_one_call_ends_the_answer_where_parallel_calls_are_off():
    for name in ("hermes", "llama3", "mistral", "mistral_named", "generic"):
        family = FAMILIES[name]
        assert answered(family.tokenizer, family.written(ULM, ULM), use=tools(parallel=False)) == ("", [ULM])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "harmony"])
def test_a_call_that_is_not_allowed_is_text_as_it_was_written(name):
    family = FAMILIES[name]
    written = family.written(("weather", '{"city": "Ulm"}'), text="" if name == "llama3" else "Look: ")
    assert answered(family.tokenizer, written, use=replace(tools(), allowed=False)) == (written, [])


def test_a_stop_string_ends_text_but_no_call():
    tokenizer = FAMILIES["hermes"].tokenizer
    assert answered(tokenizer, f"One.\n{CALL}", stops=("\n", "Ulm")) == ("One.", [ULM])
    assert answered(tokenizer, f"One. Two.{CALL}", stops=("Two",)) == ("One. ", [])
    assert answered(tokenizer, "One. Tw", stops=("Two",)) == ("One. Tw", [])


def test_reasoning_in_front_of_a_call_is_reasoning():
    pieces = pieces_of(FAMILIES["hermes"].tokenizer, f"<think>\nI call <tool_call>.\n</think>\n\nLook.\n{CALL}")
    assert collected(pieces) == ("Look.", [ULM])
    assert "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece)) == "I call <tool_call>."


def test_half_a_character_in_arguments_stays_an_escape():
    text, calls = parsed(HERMES, ['<tool_call>{"arguments": {"city": "\\ud83d"}, "name": "weather"}</tool_call>'])
    assert text == "" and [name for name, _ in calls] == ["weather"]
    assert calls[0][1].encode() == b'{"city": "\\ud83d"}'  # which a response can hold
    _, calls = parsed(HERMES, ['<tool_call>{"arguments": {"city": "\\ud83d\\ude00"}, "name": "weather"}</tool_call>'])
    assert calls == [("weather", '{"city": "\N{GRINNING FACE}"}')]


def test_a_call_without_arguments_ends_before_the_next_message():
    answer = (
        "<|channel|>commentary to=functions.time<|message|><|end|><|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Noon.<|return|>"
    )
    kinds = [type(piece) for piece in pieces_of(FAMILIES["harmony"].tokenizer, answer)]
    assert kinds[:2] == [ToolCallBegin, ToolArguments] and ToolArguments not in kinds[2:]
    assert {ReasoningPiece, TextPiece} <= set(kinds[2:])
