"""What a user saved or typed is the text that the model reads, whatever editor or shell wrote
it.
"""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from specache.eval.tasks.texts import load_text, parse_jsonl, read_jsonl
from tests.cli.running import one_line, run, run_json

QUESTION = "Wie heißt du?\nSag es."
SAVED = {
    "UTF-8 with a mark": codecs.BOM_UTF8 + QUESTION.encode(),
    "UTF-16 of Windows": codecs.BOM_UTF16_LE + QUESTION.replace("\n", "\r\n").encode("utf-16-le"),
    "CRLF": QUESTION.replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("data", SAVED.values(), ids=SAVED)
def test_a_prompt_is_the_same_from_a_file_and_a_pipe(tmp_path, tiny_folder, data):
    generate = ("generate", "-m", tiny_folder, "--dtype", "float32", "-n", "4", "--raw")
    (tmp_path / "prompt.txt").write_bytes(data)
    asked = run_json(*generate, "--prompt", QUESTION)["results"]
    assert run_json(*generate, "--prompt-file", tmp_path / "prompt.txt")["results"] == asked
    assert run_json(*generate, stdin=data)["results"] == asked
    assert run_json(*generate, "--prompt-file", "-", stdin=data)["results"] == asked


@pytest.mark.parametrize("option", ["--system", "--question"])
def test_texts_of_an_evaluation_are_checked_before_anything_is_loaded(tmp_path, option):
    arguments = ("eval", "fidelity", "-m", "any", "--methods", "full", "--out", tmp_path, option, "caf\udce9")
    assert f"{option} is not UTF-8 text: byte 0xE9" in one_line(run(*arguments, code=2).stderr)


def test_lines_of_arguments_end_as_those_of_files_do(tiny_folder):
    """As with --prompt "$(cat FILE)" of a file from Windows."""
    generate = ("generate", "-m", tiny_folder, "--dtype", "float32", "-n", "4")
    asked = run_json(*generate, "--prompt", QUESTION, "--system", "Sag\nes.")["results"]
    assert run_json(*generate, "--prompt", QUESTION.replace("\n", "\r\n"), "--system", "Sag\res.")["results"] == asked


@pytest.mark.parametrize(
    ("arguments", "stdin", "message", "code"),
    [
        (["--prompt-file", "-", "--prompt-file", "-"], b"x", "standard input can be read only once", 2),
        (["--prompt-file", "."], None, "cannot read .: Is a directory", 1),
        ([], b"\x89PNG\0", "standard input is not UTF-8 text", 1),
        ([], codecs.BOM_UTF8, "the prompt from standard input is empty", 1),
        (["--prompt", "caf\udce9"], None, "--prompt is not UTF-8 text: byte 0xE9", 1),
        (["--prompt", "x", "--system", "caf\udce9"], None, "--system is not UTF-8 text: byte 0xE9", 2),
        (["--prompt", "x", "--stop", "caf\udce9"], None, "--stop is not UTF-8 text: byte 0xE9", 2),
    ],
)
def test_input_that_is_not_text_is_refused_in_one_line(arguments, stdin, message, code):
    said = one_line(run("generate", "-m", "any", *arguments, stdin=stdin, code=code).stderr)
    assert message in said and said.count("error:") == 1


def test_a_pipe_of_messages_may_have_a_mark_and_crlf(tiny_folder):
    chat = ("chat", "-m", tiny_folder, "-n", "4", "--dtype", "float32")
    plain = run(*chat, stdin="hello\nagain\n/exit\n").stdout
    assert run(*chat, stdin=codecs.BOM_UTF8 + b"hello\r\nagain\r\n/exit\r\n").stdout == plain
    assert run(*chat, stdin=codecs.BOM_UTF16_LE + "hello\r\nagain\r\n".encode("utf-16-le")).stdout == plain
    result = run(*chat, stdin=b"hello\n\xe9t\xe9\nagain\n")
    assert result.stdout == plain
    assert "error: the message is not UTF-8 text: byte 0xE9" in one_line(result.stderr)


def test_documents_and_data_sets_of_an_evaluation_are_decoded_alike(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(SAVED["UTF-16 of Windows"])
    (tmp_path / "b.txt").write_bytes(SAVED["UTF-8 with a mark"])
    assert load_text((tmp_path / "a.txt", tmp_path / "b.txt")) == f"{QUESTION}\n\n{QUESTION}"
    records = [(1, {"a": "ü"}), (2, {"a": 2})]
    lines = '{"a": "ü"}\r\n{"a": 2}\r\n'
    (tmp_path / "marked.jsonl").write_bytes(codecs.BOM_UTF8 + lines.encode())
    (tmp_path / "wide.jsonl").write_bytes(codecs.BOM_UTF16_LE + lines.encode("utf-16-le"))
    assert list(read_jsonl(tmp_path / "marked.jsonl")) == list(read_jsonl(tmp_path / "wide.jsonl")) == records
    assert list(parse_jsonl([codecs.BOM_UTF8 + b'{"a": 1}\n'], "x")) == [(1, {"a": 1})]
