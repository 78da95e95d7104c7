"""Small tokenizers of several kinds, each with a chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.cli.tiny_chat import PAD

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKERS = (PAD, "<|im_start|>", "<|im_end|>")
HARMONY_MARKERS = (PAD, "<|return|>", "<|call|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>")
HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def byte_level(template: str, markers: tuple[str, ...], eos: str | None, written: tuple[str, ...] = ()) -> Any:
    """Return a tokenizer with one token per byte of UTF-8, special tokens `markers` and other added
    tokens `written`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*markers, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = _wrapped(backend, template, markers, eos)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in written])
    return tokenizer


def metaspace(template: str, markers: tuple[str, ...], eos: str, scheme: str, rstrip: bool = False) -> Any:
    """Return a tokenizer like SentencePiece's: spaces are characters, one stands in front, and
    characters merge into words.
    """
    letters = [*"▁abcdefghijklmnopqrstuvwxyz<>|_/\n0123456789"]
    merges = [("o", "b"), ("ob", "e"), ("obe", "y"), ("▁", "m"), ("▁m", "e"), ("e", "n"), ("en", "d"), ("h", "i"), ("▁", "hi")]
    words = ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*markers, *letters, *words]))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=markers[0]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    backend.add_special_tokens([AddedToken(marker, special=True, normalized=False, rstrip=rstrip) for marker in markers])
    return _wrapped(backend, template, markers, eos)


def whole_words(template: str, markers: tuple[str, ...], eos: str, words: list[str]) -> Any:
    """Return a tokenizer with one token per word, markers included, so that markers cannot be
    spelled as text.
    """
    vocabulary = {word: index for index, word in enumerate([*markers, "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(backend, template, markers, eos, unk_token="<unk>")


def _wrapped(backend: Any, template: str, markers: tuple[str, ...], eos: str | None, **more: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=markers[0],
        eos_token=eos,
        additional_special_tokens=[marker for marker in markers[1:] if marker != eos],
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **more,
    )
