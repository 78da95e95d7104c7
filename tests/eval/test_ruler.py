"""RULER's 13 tasks: the answers are in the text, prompts fill the length, scores are RULER's."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from specache.engine.attention_hook import attached
from specache.errors import ConfigError, TaskDataError
from specache.eval.catalogue import task_class
from specache.eval.methods.specache import FullMethod
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Item, TaskModel
from specache.eval.tasks.ruler import Ruler
from specache.eval.tasks.ruler.scoring import clean, string_match_all, string_match_part
from specache.eval.tasks.ruler.subtasks import SUBTASKS
from specache.eval.tasks.ruler.words import ADJECTIVES, NOUNS, VERBS
from tests.cli.tiny_chat import byte_tokenizer
from tests.tiny import llama

NEEDLE_TASKS = [name for name in SUBTASKS if name.startswith("niah")]
WITHOUT_FILES = tuple(name for name in SUBTASKS if not name.startswith("qa"))
MOST_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NUMBER = r"[1-9][0-9]{6}"
PAIR = r"[a-z]+-[a-z]+"


class PieceTokenizer:
    """A tokenizer of words, split into runs of up to three characters.

    Spaces and line breaks belong to what follows them.
    """

    chat_template = "yes"

    def __init__(self) -> None:
        self._pieces: list[str] = ["<s>"]
        self._ids: dict[str, int] = {}
        self.calls = 0

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.calls += 1
        ids = [self._id(piece) for piece in re.findall(r"\s*\w{1,3}|\s*[^\w\s]|\s+", text)]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt and not tokenize
        return "".join(f"<{message['role']}>{message['content']}<end>" for message in messages) + "<assistant>"

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self._pieces[i] for i in ids if i or not skip_special_tokens)

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]


@dataclass
class Made:
    items: list[Item]
    texts: list[str]
    calls: int


def make(task: Ruler) -> Made:
    tokenizer = PieceTokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        items = list(task.items(TaskModel(llama(max_position_embeddings=32_768), tokenizer, "tiny")))
    return Made(items, [tokenizer.decode(item.prompt, skip_special_tokens=True) for item in items], tokenizer.calls)


def one_task(name: str, **options: Any) -> Made:
    return make(Ruler(**{"tasks": (name,), "lengths": (2048,), "samples": 4, "chat": False, **options}))


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Any]:
    """Return a SQuAD of 20 articles with 4 paragraphs, and a HotpotQA of 15 questions.

    Each question of HotpotQA has 10 documents.
    """
    rng = Random(0)

    def prose(start: str) -> str:
        return f"{start}. " + " ".join(rng.choice(NOUNS) for _ in range(40)) + "."

    def paragraph(a: int, p: int) -> dict[str, Any]:
        question = {"question": f"Who owns house {a}-{p}?", "answers": [{"text": f"Owner {a}-{p}"}, {"text": f"Mr {a}-{p}"}]}
        impossible = {"question": "Unknown?", "answers": [], "is_impossible": True}
        return {"context": prose(f"House {a}-{p} is owned by Owner {a}-{p}, also Mr {a}-{p}"), "qas": [question, impossible]}

    squad = {"data": [{"paragraphs": [paragraph(a, p) for p in range(4)]} for a in range(20)]}
    hotpotqa = [
        {
            "question": f"Which river is in land {q}?",
            "answer": f"River {q}",
            "supporting_facts": [[f"Land {q}-0", 0], [f"Land {q}-1", 0]],
            "context": [[f"Land {q}-{d}", [prose(f"It has River {q}"), prose(" Far")]] for d in range(10)],
        }
        for q in range(15)
    ]
    for name, content in (("squad", squad), ("hotpotqa", hotpotqa)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {"qa1": tmp_path / "squad.json", "qa2": tmp_path / "hotpotqa.json"}


def test_ruler_is_registered_with_a_help_for_every_option() -> None:
    assert task_class("ruler") is Ruler
    assert all(field.metadata.get("help") for field in fields(Ruler))
    assert json.loads(json.dumps(Ruler(haystack=(Path("a.txt"),)).settings()))["haystack"] == ["a.txt"]


def test_there_are_13_tasks() -> None:
    assert list(SUBTASKS) == [
        *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_fill_the_length_and_leave_room_for_the_answer(chat: bool, corpora: dict[str, Any]) -> None:
    made = make(Ruler(lengths=(2048,), samples=3, chat=chat, **corpora))
    assert {item.group for item in made.items} == set(SUBTASKS)
    assert made.calls < 3 * len(made.items)  # texts are not tokenised again and again
    for item in made.items:
        most = next(most for name, most in MOST_NEW_TOKENS.items() if item.group.startswith(name))
        assert item.facts["max_new_tokens"] == most
        assert 0.9 * 2048 <= len(item.prompt) + most <= 2048, item.id


def test_each_length_has_its_own_group() -> None:
    made = make(Ruler(tasks=("vt", "fwe"), lengths=(1024, 4096), samples=2, chat=False))
    assert [item.group for item in made.items[::2]] == ["vt/1024", "fwe/1024", "vt/4096", "fwe/4096"]
    assert len({item.id for item in made.items}) == len(made.items) == 8
    assert [len(item.prompt) > 2000 for item in made.items] == [False] * 4 + [True] * 4


def test_items_depend_on_the_seed_and_on_nothing_else() -> None:
    task = Ruler(tasks=WITHOUT_FILES, lengths=(2048,), samples=2, chat=False)
    first, again, other = make(task), make(task), make(replace(task, seed=1))
    assert first.texts == again.texts and first.items == again.items
    assert [item.id for item in other.items] == [item.id for item in first.items]
    assert all(mine != theirs for mine, theirs in zip(first.texts, other.texts, strict=True))
    assert make(replace(task, samples=3)).items[:2] == first.items[:2]  # more samples keep the first ones


@pytest.mark.parametrize("name", NEEDLE_TASKS)
def test_every_needle_is_in_the_context_where_the_facts_say(name: str) -> None:
    made = one_task(name)
    for item, text in zip(made.items, made.texts, strict=True):
        context = text.split("\n", 1)[1].rsplit("\nWhat ", 1)[0]
        assert len(item.facts["references"]) == len(item.facts["depths"])
        for value, depth in zip(item.facts["references"], item.facts["depths"], strict=True):
            [needle] = [found.group() for found in re.finditer(rf"One of the special magic \w+ for \S+ is: {value}\.", context)]
            assert context.index(needle) == pytest.approx(depth * (len(context) - len(needle)), abs=0.5)
            key = needle.split(" for ")[1].split(" is: ")[0]
            assert text.count(key) == 3 if name != "niah_multivalue" else 6  # needles, question, beginning of the answer


@pytest.mark.parametrize(
    ("name", "haystack", "key", "value", "needles", "asked"),
    [
        ("niah_single_1", "noise", PAIR, NUMBER, 1, 1),
        ("niah_single_2", "essay", PAIR, NUMBER, 1, 1),
        ("niah_single_3", "essay", PAIR, UUID, 1, 1),
        ("niah_multikey_1", "essay", PAIR, NUMBER, 4, 1),
        ("niah_multikey_2", "needles", PAIR, NUMBER, None, 1),
        ("niah_multikey_3", "needles", UUID, UUID, None, 1),
        ("niah_multivalue", "essay", PAIR, NUMBER, 4, 4),
        ("niah_multiquery", "essay", PAIR, NUMBER, 4, 4),
    ],
)
def test_needle_tasks_are_rulers(name: str, haystack: str, key: str, value: str, needles: int | None, asked: int) -> None:
    made = one_task(name, samples=2)
    for item, text in zip(made.items, made.texts, strict=True):
        kind = "uuid" if value is UUID else "number"
        found = re.findall(rf"One of the special magic {kind}s for ({key}) is: ({value})\.", text)
        assert found and len(found) == (needles or len(found))
        assert len(item.facts["references"]) == asked and all(re.fullmatch(value, one) for one in item.facts["references"])
        if asked == 1:
            [query] = [k for k, v in found if [v] == item.facts["references"]]
            plural, verb, end = "", "What is the", "is"
            assert text.startswith(f"A special magic {kind} is hidden within the following text. Make sure to memorize it. ")
        else:
            keys = re.findall(key, text.rsplit(" mentioned in the provided text are", 1)[0].rsplit(" for ", 1)[1])
            query = keys[0] if len(keys) == 1 else f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}"
            plural, verb, end = "s", "What are all the", "are"
            assert text.startswith("Some special magic numbers are hidden within the following text. Make sure to memorize it. ")
        assert f" I will quiz you about the {kind}{plural} afterwards.\n" in text
        where = f"special magic {kind}{plural} for {query} mentioned in the provided text"
        assert text.endswith(f"\n{verb} {where}? The {where} {end}")
        lines = text.split("\n")[1:-1]
        if haystack == "noise":
            assert Counter(lines).most_common(1)[0] == (NOISE, len(lines) - 1)
        elif haystack == "needles":
            assert len(lines) == len(found) > 20 and len({k for k, _ in found}) == len(found)
        else:
            assert len(lines) == 1 and len(lines[0]) > 3000


def test_files_can_be_the_haystack(tmp_path: Path) -> None:
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    files[0].write_text("First   sentence here.\nAnother one! ")
    files[1].write_text("Is this the last? Yes")
    [text] = one_task("niah_single_2", haystack=files, samples=1).texts
    context = re.sub(r" ?One of the special [^.]*\.", "", text.split("\n")[1]).strip()
    story = "First sentence here. Another one! Is this the last? Yes"
    assert context == " ".join([story] * 1000)[: len(context)]  # begun anew until the length is full


def test_variable_chains_lead_from_the_value_to_every_reference() -> None:
    made = one_task("vt")
    for item, text in zip(made.items, made.texts, strict=True):
        example, context = text.split("\n\n\n\n")
        answered = example.rsplit("they are:  ", 1)[1].split()
        assert len(answered) == 5 and all(re.fullmatch(r"[A-Z]{3}", name) for name in answered)
        [(first, value)] = re.findall(r"VAR ([A-Z]{5}) = (\d{5})", context)
        chain = [first]
        for name, before in re.findall(r"VAR ([A-Z]{5}) = VAR ([A-Z]{5}) ", context):
            assert before == chain[-1]
            chain.append(name)
        assert chain == item.facts["references"] and len(set(chain)) == 5
        assert context.endswith(
            f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
            f"chain(s) of variable assignment in the text above, 5 variables are assigned the value {value}, they are: "
        )
        assert item.facts["depths"] == sorted(item.facts["depths"])


@pytest.mark.parametrize(("length", "common", "uncommon"), [(2048, 6, 1), (8192, 30, 3)])
def test_the_ten_common_words_are_the_most_frequent(length: int, common: int, uncommon: int) -> None:
    made = one_task("cwe", lengths=(length,), samples=2)
    for item, text in zip(made.items, made.texts, strict=True):
        example, asked = text.split("\nBelow is a numbered list")
        shown = re.findall(r"(\d+)\. (\S+)", example.split("in the list are:")[1])
        assert [number for number, _ in shown] == [str(n) for n in range(1, 11)]
        entries = re.findall(r"(\d+)\. (\S+)", asked.split("\nQuestion:")[0])
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries)
        assert {word for word, count in counts.items() if count == common} == set(item.facts["references"])
        assert len(item.facts["references"]) == 10
        assert set(counts.values()) == {common, uncommon}
        assert text.endswith("in the above list? Answer: The top 10 words that appear most often in the list are:")


def test_long_lists_have_enough_words() -> None:
    [text] = one_task("cwe", lengths=(32_768,), samples=1).texts
    words = {word for _, word in re.findall(r"(\d+)\. (\S+)", text)}
    assert len(words) > 1000


@pytest.mark.parametrize("length", [500, 2048, 8192])
def test_the_three_coded_words_are_the_most_frequent_after_the_dots(length: int) -> None:
    made = one_task("fwe", lengths=(length,))
    for item, text in zip(made.items, made.texts, strict=True):
        context = text.split("Find the three most frequently appeared coded words. ")[1].split("\nQuestion:")[0]
        ranked = Counter(context.split()).most_common()
        assert [word for word, _ in ranked[:4]] == ["...", *item.facts["references"]]
        assert len(ranked) == 4 or ranked[3][1] > ranked[4][1]
        assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked[1:])


@pytest.mark.parametrize(("name", "documents"), [("qa_1", 1), ("qa_2", 10)])
def test_the_documents_with_the_answer_are_among_the_others(name: str, documents: int, corpora: dict[str, Any]) -> None:
    made = one_task(name, lengths=(4096,), **corpora)
    assert len(set(made.texts)) == 4
    for item, text in zip(made.items, made.texts, strict=True):
        numbers = [int(number) for number in re.findall(r"Document (\d+):\n", text)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > documents
        asked = text.rsplit("Question: ", 1)[1].removesuffix(" Answer:")
        which = asked.removesuffix("?").rsplit(" ", 1)[1]
        assert item.facts["references"] == ([f"Owner {which}", f"Mr {which}"] if name == "qa_1" else [f"River {which}"])
        assert text.count(f"\n{'House' if name == 'qa_1' else 'Land'} {which}{' ' if name == 'qa_1' else '-'}") == documents
        assert all(f"Document {n}:" in text for n in numbers)


def test_short_prompts_have_the_documents_with_the_answer_before_others(corpora: dict[str, Any]) -> None:
    made = one_task("qa_2", lengths=(900,), **corpora)
    for item, text in zip(made.items, made.texts, strict=True):
        [river] = item.facts["references"]
        land = river.replace("River", "Land")
        assert f"\n{land}-0\n" in text and f"\n{land}-1\n" in text


def test_a_corpus_smaller_than_the_length_is_repeated(corpora: dict[str, Any]) -> None:
    [item] = one_task("qa_1", **corpora, lengths=(16_384,), samples=1).items
    assert len(item.prompt) > 0.9 * 16_384


@pytest.mark.parametrize("name", ["niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multiquery"])
def test_several_questions_share_one_context(name: str) -> None:
    made = one_task(name, questions=3, samples=6)
    asked = [item.facts["references"] for item in made.items]
    assert len({value for references in asked for value in references}) == sum(map(len, asked))
    for group in (made.items[:3], made.items[3:]):
        for item in group:
            assert item.shared == group[0].shared and item.prompt[: item.shared] == group[0].prompt[: item.shared]
            assert len(item.prompt) - item.shared < 150
    assert made.texts[0].split("\nWhat ")[0] != made.texts[3].split("\nWhat ")[0]


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multivalue", "vt", "cwe", "fwe"])
def test_other_tasks_ask_one_question_per_context(name: str) -> None:
    assert [item.shared for item in one_task(name, questions=3, samples=2).items] == [0, 0]


def test_the_task_ends_at_its_number_of_samples() -> None:
    assert len(one_task("niah_multikey_3", questions=3, samples=4).items) == 4


def test_the_answer_begins_after_the_chat_template() -> None:
    [text] = one_task("niah_single_1", samples=1, chat=True).texts
    assert text.startswith("<user>A special magic number is hidden")
    assert re.search(r"provided text\?<end><assistant> The special magic number for \S+ mentioned in the provided text is$", text)


def test_scores_of_known_answers() -> None:
    assert string_match_all("It is 123 and ABC", ["123", "abc"]) == 1
    assert string_match_all("only 123 here", ["123", "abc", "x", "z"]) == 0.25
    assert string_match_all("", ["123"]) == 0
    assert string_match_part("in PARIS, of course", ["paris", "the capital"]) == 1
    assert string_match_part("London", ["paris", "the capital"]) == 0
    assert clean("\t a\x00b \n") == "a\nb"


@pytest.mark.parametrize("name", ["niah_multivalue", "vt", "cwe", "fwe", "qa_1"])
def test_right_wrong_and_half_right_answers_are_scored(name: str, corpora: dict[str, Any]) -> None:
    """Half of an answer scores a half, or 1 where one reference suffices."""
    tokenizer = PieceTokenizer()
    task = Ruler(tasks=(name,), lengths=(2048,), samples=1, chat=False, **corpora)
    model = TaskModel(llama(eos_token_id=0), tokenizer, "tiny")
    [item] = task.items(model)
    references = item.facts["references"]

    def score(answer: str) -> float:
        said = _FixedAnswer(tokenizer(answer, add_special_tokens=False)["input_ids"])
        measured = task.measure(model, task.prepare(model, item, said), said)  # type: ignore[arg-type]
        assert measured.details["references"] == references
        assert answer.startswith(measured.details["prediction"])  # once everything is found, nothing more is decoded
        return measured.values[0]

    assert score(" ".join(references)[:150].rstrip() if name == "cwe" else " ".join(references)) == 1
    assert score("no idea") == 0
    half = references[: len(references) // 2]
    assert score(" ".join(half)) == (1 if name == "qa_1" else len(half) / len(references))


class _FixedAnswer:
    """A prompt and a session that answer with given tokens."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = [*ids, 0]
        self._at = 0

    @property
    def logits(self) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self._ids[self._at]), max(self._ids) + 1).float()

    def feed(self, token: int) -> torch.Tensor:
        assert token == self._ids[self._at]
        self._at += 1
        return self.logits


def test_ruler_runs_over_the_full_cache() -> None:
    tokenizer = byte_tokenizer()
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    task = Ruler(tasks=("niah_single_1",), lengths=(1024,), samples=1)
    evaluated = TaskModel(model, tokenizer, "tiny")
    [item] = task.items(evaluated)
    with torch.no_grad(), attached(model):
        prompt = Prefilled(model, item.prompt)
        session = FullMethod().start(prompt)
        measured = task.measure(evaluated, task.prepare(evaluated, item, prompt), session)
        session.close()
        prompt.close()
    assert measured.values == [0.0] and measured.details["references"] == item.facts["references"]


def test_questions_about_documents_need_their_files(corpora: dict[str, Any]) -> None:
    model = TaskModel(llama(), PieceTokenizer(), "tiny")
    with pytest.raises(TaskDataError, match=r"qa_2 .*HotpotQA \(--qa2 FILE\)"):
        next(Ruler(tasks=("vt", "qa_2"), lengths=(1024,), qa1=corpora["qa1"]).items(model))
    with pytest.warns(UserWarning, match=r"without qa_1, qa_2: they need SQuAD \(--qa1 FILE\) and HotpotQA \(--qa2 FILE\)"):
        next(Ruler(lengths=(1024,)).items(model))
    assert Ruler().left_out == ("qa_1", "qa_2")
    assert Ruler(qa1=corpora["qa1"]).left_out == ("qa_2",)
    assert Ruler(tasks=("vt",)).left_out == () == Ruler(**corpora).left_out


BROKEN_SQUAD = {
    '{"data": [}': r"not JSON: .* at line 1, column 11",
    '{\n"data": 3}': r": data is missing or not a list",
    "[]": r": data is missing",
    '{"data": [{"paragraphs": [{"qas": []}]}]}': r": data\[0\]\.paragraphs\[0\]\.context is missing or not a string",
    '{"data": [{"paragraphs": [{"context": "c", "qas": [{"answers": [{"text": 1}]}]}]}]}': r"answers\[0\]\.text is missing",
    '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}]}': r"no question with an answer",
    "\xff": r"line 1",
    "": r"is empty",
}
BROKEN_HOTPOTQA = {
    '{"data": 1}': r"a list of questions was expected",
    "[]": r"no question with an answer",
    '[{"question": "q", "answer": "a", "context": [["title"]]}]': r"\[0\]\.context\[0\] is not \[title, \[sentences\]\]",
    '[{"question": "q", "context": [["t", ["s"]]]}]': r"\[0\]\.answer is missing or not a string",
    "[3]": r"\[0\]\.context is missing",
    '[{"question": 1, "supporting_facts": [3, []], "context": [["t", ["s"]]]}]': r"\[0\]\.question is missing or not a string",
    "[": r"not JSON: .* at line 1, column 2",
}


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [("qa1", *pair) for pair in BROKEN_SQUAD.items()] + [("qa2", *pair) for pair in BROKEN_HOTPOTQA.items()],
)
def test_malformed_corpora_are_named_with_the_place(option: str, content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "corpus.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(TaskDataError, match=message) as raised:
        one_task(option.replace("qa", "qa_"), **{option: file})
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("options", [{"haystack": ("missing.txt",)}, {"qa1": "missing.txt"}])
def test_missing_files_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    paths = {key: tuple(map(Path, value)) if isinstance(value, tuple) else Path(value) for key, value in options.items()}
    with pytest.raises(TaskDataError, match=r"cannot read missing\.txt"):
        one_task("qa_1" if "qa1" in options else "niah_single_2", **paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("niah",)}, "no task 'niah'. It has niah_single_1,"),
        ({"tasks": ("vt", "vt")}, "--tasks names vt twice"),
        ({"lengths": (1024, 1024)}, "--lengths names 1024 twice"),
        ({"lengths": ()}, "--lengths"),
        ({"lengths": (0,)}, "--lengths"),
        ({"samples": 0}, "--samples"),
        ({"questions": 0}, "--questions"),
        ({"questions": 11}, "--questions must be at most 10"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Ruler(**options)


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_a_length_that_is_too_short_says_how_long_it_must_be(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"RULER's {name} needs at least ([\d,]+) tokens, got 150") as raised:
        one_task(name, lengths=(150,))
    least = int(re.findall(r"least ([\d,]+)", str(raised.value))[0].replace(",", ""))
    assert one_task(name, lengths=(least + 60,), samples=1).items


def test_a_length_beyond_the_models_positions_is_refused() -> None:
    with pytest.raises(ConfigError, match="positions"):
        one_task("vt", lengths=(32_769,))


def test_the_vocabulary_has_no_word_twice() -> None:
    for words in (ADJECTIVES, NOUNS, VERBS):
        assert len(words) > 300 and len(set(words)) == len(words)
        assert all(re.fullmatch(r"[a-z]+", word) for word in words)
