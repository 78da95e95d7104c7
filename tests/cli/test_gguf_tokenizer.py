"""A GGUF file's tokenizer gives the tokens that the model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from specache.cli.gguf_tokenizer import correct_tokenizer

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BYTES = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
ALPHABET = [(letter, NORMAL) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())]
BYTE_LEVEL = [("<s>", CONTROL), ("</s>", CONTROL), *ALPHABET, ("he", NORMAL), ("hello", NORMAL)]
SENTENCE_PIECE = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *BYTES, ("▁", NORMAL), ("a", NORMAL), ("▁a", NORMAL)]


def tokens(folder: Path, text: str, model: str, vocabulary: list[tuple[str, int]], **fields: Any) -> list[str]:
    """Return a text's tokens by a file of this vocabulary, from the tokenizer as it is saved."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    names, kinds = zip(*vocabulary, strict=True)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    if model == "gpt2":
        writer.add_token_merges(["h e"])
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
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=path.name, local_files_only=True)
    correct_tokenizer(tokenizer, path)
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
