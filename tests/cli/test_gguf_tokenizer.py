"""A GGUF file's tokenizer gives the tokens that the model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from specache.cli.gguf_settings import GgufSettingError
from specache.cli.gguf_splitting import splitter
from specache.cli.gguf_tokenizer import correct_tokenizer

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BYTES = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
ALPHABET = [(letter, NORMAL) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())]
BYTE_LEVEL = [("<s>", CONTROL), ("</s>", CONTROL), *ALPHABET, *((text, NORMAL) for text in ("he", "hello", "ĠĠ", "ĠĠĠ", "12"))]
SENTENCE_PIECE = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *BYTES, ("▁", NORMAL), ("a", NORMAL), ("▁a", NORMAL)]


def write_gguf(folder: Path, model: str, vocabulary: list[tuple[str, int]], **fields: Any) -> Path:
    """Write a file of this vocabulary, without weights."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    names, kinds = zip(*vocabulary, strict=True)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    if model == "gpt2":
        writer.add_token_merges(["h e", "Ġ Ġ", "ĠĠ Ġ", "1 2"])
    else:
        writer.add_token_scores([-float(index) for index in range(len(names))])
    writer.add_bos_token_id(names.index("<s>"))
    writer.add_eos_token_id(names.index("</s>"))
    for name, value in fields.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_string
        add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def tokens(folder: Path, text: str, model: str, vocabulary: list[tuple[str, int]], **fields: Any) -> list[str]:
    """Return a text's tokens by a file of this vocabulary, from the tokenizer as it is saved."""
    path = write_gguf(folder, model, vocabulary, **fields)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=path.name, local_files_only=True)
    correct_tokenizer(tokenizer, gguf.GGUFReader(str(path), "r"))
    assert tokenizer.eos_token == "</s>"
    tokenizer.save_pretrained(folder / "saved")
    loaded = AutoTokenizer.from_pretrained(folder / "saved")
    ids = loaded(text)["input_ids"]
    assert loaded.decode(ids, skip_special_tokens=True) == text
    return list(loaded.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("rule", ["llama-bpe", "tekken"])
def test_a_file_that_does_not_say_begins_texts_as_its_rule_does(tmp_path, rule):
    """Whole pieces are tokens, merges or none."""
    assert tokens(tmp_path, "hello", "gpt2", BYTE_LEVEL, pre=rule) == ["<s>", "hello"]


def test_pieces_may_be_whole_where_no_bos_is_put_in_front(tmp_path):
    assert tokens(tmp_path, "hello", "gpt2", BYTE_LEVEL, pre="minicpm5") == ["hello"]


def test_a_file_that_says_so_begins_texts_without_bos(tmp_path):
    assert tokens(tmp_path, "hello", "gpt2", BYTE_LEVEL, pre="llama-bpe", add_bos_token=False) == ["hello"]


def test_other_rules_have_neither(tmp_path):
    assert tokens(tmp_path, "hello", "gpt2", BYTE_LEVEL, pre="qwen2") == ["he", "l", "l", "o"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, "▁a"), ({"add_space_prefix": True}, "▁a"), ({"add_space_prefix": False}, "a")],
)
def test_a_text_begins_with_a_space_unless_the_file_says_no(tmp_path, fields, expected):
    assert tokens(tmp_path, "a", "llama", SENTENCE_PIECE, **fields) == ["<s>", expected]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("smollm", ["ĠĠĠ", "1", "2"]),
        ("gpt-2", ["ĠĠ", "Ġ", "12"]),
        ("qwen2", ["ĠĠ", "Ġ", "1", "2"]),
        ("llama-bpe", ["ĠĠ", "Ġ", "12"]),
    ],
)
def test_a_text_is_split_by_the_rule_that_the_file_names(tmp_path, rule, expected):
    """Transformers' reader knows some rules, and takes GPT-2's for the others."""
    assert tokens(tmp_path, "   12", "gpt2", BYTE_LEVEL, pre=rule, add_bos_token=False) == expected


def test_a_rule_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(GgufSettingError, match=r"'kimi-k2'.*original files"):
        tokens(tmp_path, "a", "gpt2", BYTE_LEVEL, pre="kimi-k2")


def test_a_file_that_names_no_rule_is_noted(tmp_path):
    path = write_gguf(tmp_path, "gpt2", BYTE_LEVEL)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name, local_files_only=True)
    notes: list[str] = []
    correct_tokenizer(tokenizer, gguf.GGUFReader(str(path), "r"), notes.append)
    assert len(notes) == 1 and "GPT-2's rule" in notes[0]


SAMPLE = (
    "I'LL say it's 1234567 (or 3.14) dollars,\n\n    for x in range(10):\r\n\tprint(x)  # don't\n"
    "na\u00efve e\u0301t\u00e9 \u4e2d\u6587\u5b57 \u3042\u308a 12\u00bd \u10e5\u10d0 iPhone HTTPServer --flag=a|b   \n  "
)


def pieces(rule: str) -> list[str]:
    return [SAMPLE[start:stop] for _, (start, stop) in splitter(rule).pre_tokenize_str(SAMPLE)]


@pytest.mark.parametrize(
    ("rule", "plain"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        ("smollm", pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    ],
)
def test_rules_that_tokenizers_has_are_its_own(rule, plain):
    assert pieces(rule) == [SAMPLE[start:stop] for _, (start, stop) in plain.pre_tokenize_str(SAMPLE)]


def test_rules_that_transformers_knows_are_its_own():
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    for rule, expression in mapping.GGUF_PRE_TOKENIZER_SPLITS.items():
        split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
        assert pieces(rule) == [SAMPLE[start:stop] for _, (start, stop) in split.pre_tokenize_str(SAMPLE)], rule


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("falcon", [" ", "(", "123", "45", ")"]),
        ("deepseek-v3", [" (", "123", "45", ")"]),
        ("deepseek-coder", [" (", "1", "2", "3", "4", "5", ")"]),
        ("tiny_aya", [" (", "12", "345", ")"]),
        ("minicpm5", [" (", "123", "45", ")"]),
        ("viking", [" (", "1", "2", "3", "4", "5", ")"]),
    ],
)
def test_numbers_are_split_as_the_rule_says(rule, expected):
    text = " (12345)"
    found = [text[start:stop] for _, (start, stop) in splitter(rule).pre_tokenize_str(text)]
    assert "".join(found) == text
    assert found == expected
