"""Reading the files of tasks: clear errors for bad files, prompts as token ids."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from specache.errors import TaskDataError
from specache.eval.tasks.texts import encode_prompt, load_text, parse_jsonl, read_jsonl, shared_prefix
from specache.templates.template import ChatTemplate
from tests.cli.tiny_chat import byte_tokenizer


def test_the_default_text_is_long_and_always_the_same() -> None:
    text = load_text(())
    assert len(text) > 100_000
    assert text == load_text(())


def test_files_are_joined_in_the_given_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(f"text {name}", encoding="utf-8")
    assert load_text((tmp_path / "b", tmp_path / "a")) == "text b\n\ntext a"


@pytest.mark.parametrize(("content", "complaint"), [(None, "No such file"), (b" \n", "is empty"), (b"\xff\xfe", "not UTF-8")])
def test_a_bad_text_file_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "story.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TaskDataError, match=complaint) as error:
        load_text((path,))
    assert "story.txt" in str(error.value)


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
def test_records_come_with_their_line_numbers(tmp_path: Path, name: str) -> None:
    content = b'{"a": 1}\n\n{"a": 2}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_jsonl(tmp_path / name)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"a": 1', r"not JSON \(.* at column 8\)"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(line: bytes, complaint: str) -> None:
    with pytest.raises(TaskDataError, match=rf"data\.jsonl, line 2: {complaint}"):
        list(parse_jsonl([b'{"a": 1}\n', line + b"\n"], "data.jsonl"))


@pytest.mark.parametrize(
    ("name", "content"), [("r.jsonl", None), ("r.jsonl", b"\n"), ("r.jsonl.gz", b"plain"), ("r.jsonl.gz", b"")]
)
def test_an_unreadable_file_of_records_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskDataError, match=r"r\.jsonl"):
        list(read_jsonl(tmp_path / name))


def test_a_truncated_gzip_file_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    (tmp_path / "r.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TaskDataError, match=r"r\.jsonl\.gz"):
        list(read_jsonl(tmp_path / "r.jsonl.gz"))


def test_a_prompt_is_a_users_message_or_the_text_itself() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encode_prompt(ChatTemplate(tokenizer), "hi", chat=True)) == "<user>hi<end><assistant>"
    assert (
        tokenizer.decode(encode_prompt(ChatTemplate(tokenizer), "hi", chat=True, answer_prefix="well, "))
        == "<user>hi<end><assistant>well, "
    )
    assert tokenizer.decode(encode_prompt(ChatTemplate(tokenizer), "hi", chat=False, answer_prefix=" you")) == "hi you"
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(ChatTemplate(tokenizer), "hi", chat=True)) == "hi"


def test_the_shared_prefix_is_the_longest_common_one_and_leaves_a_token() -> None:
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 9]]) == 2
    assert shared_prefix([[1, 2], [1, 2, 3]]) == 1
    assert shared_prefix([[1, 2, 3]]) == 0
