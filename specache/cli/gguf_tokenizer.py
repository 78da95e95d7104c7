"""Apply what a GGUF file says of its tokenizer and transformers' reader drops.

A prompt would have other tokens than those that the model was trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from specache.cli.gguf_splitting import LLAMA3_RULES, splitter

if TYPE_CHECKING:
    from gguf import GGUFReader

_BEGINS_WITH_BOS = (*LLAMA3_RULES, "tekken")  # where a file does not say
_WHOLE_PIECES = (*_BEGINS_WITH_BOS, "minicpm5")  # a piece of text that is a token stays whole, merges or none
_UNNAMED = ("", "default")  # files from before rules had names: any rule may be meant


def correct_tokenizer(tokenizer: Any, reader: GGUFReader, on_note: Callable[[str], None] = lambda note: None) -> None:
    """Set end token, BOS, the rule that splits texts, whole pieces, and the space before a text, as
    the file has them.

    Files from before `add_bos_token` was written begin texts as llama.cpp does, by the name of the
    rule that splits texts.

    Args:
        reader: of the file.
        on_note: called with a line if the file does not name its rule.

    Raises:
        GgufSettingError: the rule that splits texts is not known.
    """
    fields = _fields(reader)
    end = fields.get("eos_token_id")
    if end is not None:  # transformers 5.17 may use another
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(end))
    rule = fields.get("pre", "")
    if fields.get("model") == "gpt2":
        if rule in _UNNAMED:
            on_note(
                "The GGUF file does not say how its model splits texts; GPT-2's rule is used. A newer file of the model says it."
            )
        else:
            tokenizer.backend_tokenizer.pre_tokenizer = splitter(rule)
        if rule in _WHOLE_PIECES:
            tokenizer.backend_tokenizer.model.ignore_merges = True
        if rule in _BEGINS_WITH_BOS and "add_bos_token" not in fields and tokenizer.bos_token is not None:
            tokenizer.add_bos_token = True
    if fields.get("model") == "llama" and fields.get("add_space_prefix") is False:
        _leave_out_space(tokenizer.backend_tokenizer)


def _leave_out_space(backend: Any) -> None:
    """Put no space before a text, if the tokenizer does so by splitting it (`Metaspace`)."""
    from tokenizers import decoders, pre_tokenizers

    space = getattr(backend.pre_tokenizer, "replacement", None)
    if space is None or getattr(backend.pre_tokenizer, "prepend_scheme", "never") == "never":
        return
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])


def _fields(reader: GGUFReader) -> dict[str, Any]:
    """Return what the file says of its tokenizer in single values."""
    names = ("model", "pre", "eos_token_id", "add_bos_token", "add_space_prefix")
    found = {name: reader.get_field(f"tokenizer.ggml.{name}") for name in names}
    return {name: field.contents() for name, field in found.items() if field is not None}
