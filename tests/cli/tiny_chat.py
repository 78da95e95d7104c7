"""A tiny model that can be loaded from a folder: every byte is a token, and it has a chat
template.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import llama

PAD, END, USER, ASSISTANT, SYSTEM = "<pad>", "<end>", "<user>", "<assistant>", "<system>"
SPECIAL = [PAD, END, USER, ASSISTANT, SYSTEM]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
POSITIONS = 512


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte of UTF-8, after the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tiny_chat_model(folder: Path, *, chat_template: bool = True) -> None:
    """Model and tokenizer into `folder`.

    Its generation settings ask for sampling, as those of many real models do.
    """
    tokenizer = byte_tokenizer()
    if not chat_template:
        tokenizer.chat_template = None
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, eos_token_id=tokenizer.eos_token_id)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    model.generation_config.top_k = 20
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
