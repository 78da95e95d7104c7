"""Read prompts and make conversations of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specache.errors import ConfigError
from specache.platform.text_files import read_stream, read_text, typed_text
from specache.templates.template import Message, PromptError

if TYPE_CHECKING:
    import torch

STDIN = "-"


@dataclass(frozen=True)
class Prompt:
    """A text and its origin."""

    text: str
    origin: str


def read_prompts(texts: list[str], files: list[Path]) -> list[Prompt]:
    """Return the prompts of one call: the texts, the files, or piped input.

    Raises:
        ConfigError: both texts and files, or neither of them and no piped input.
        PromptError: a file cannot be read, or a prompt is empty.
    """
    if texts and files:
        raise ConfigError(
            "--prompt and --prompt-file exclude each other. To ask about a file, pipe both in: "
            "(cat FILE; echo; echo QUESTION) | specache generate"
        )
    if [str(file) for file in files].count(STDIN) > 1:
        raise ConfigError(
            "--prompt-file - was given twice, but standard input can be read only once. Save one of the prompts in a file."
        )
    if texts:
        names = ["--prompt"] if len(texts) == 1 else [f"--prompt {number}" for number in range(1, len(texts) + 1)]
        prompts = [
            Prompt(typed_text(text, f"the text of {name}", PromptError), name) for text, name in zip(texts, names, strict=True)
        ]
    elif files:
        prompts = [Prompt(_read(file), str(file)) for file in files]
    elif _stdin_is_terminal():
        raise ConfigError("there is no prompt. Pass --prompt TEXT or --prompt-file FILE, or pipe one in.")
    else:
        prompts = [Prompt(_read(Path(STDIN)), "standard input")]
    for prompt in prompts:
        if not prompt.text.strip():
            raise PromptError(f"the prompt from {prompt.origin} is empty.")
    return prompts


def _stdin_is_terminal() -> bool:
    return sys.stdin is None or sys.stdin.closed or sys.stdin.isatty()


def _read(file: Path) -> str:
    """Return the text of a prompt file; `-` is standard input."""
    if str(file) != STDIN:
        return read_text(file, PromptError)
    if sys.stdin is None or sys.stdin.closed:
        raise PromptError("there is nothing to read: standard input is closed.")
    return read_stream(sys.stdin.buffer, "standard input", PromptError)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a raw text, with the tokenizer's own first token.

    Special tokens spelled in it are special tokens: `--raw` is for users who write them.
    """
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def answered(messages: list[Message], text: str) -> list[Message]:
    """Return a conversation with the model's answer appended."""
    return [*messages, {"role": "assistant", "content": text}]


def system_message(system: str | None) -> list[Message]:
    """Return the beginning of a conversation: one message, or none."""
    return [] if system is None else [{"role": "system", "content": system}]


def pad_left(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded `input_ids [B, S]` and `attention_mask [B, S]`.

    The mask is always explicit, because many models pad with a token that also ends every message
    of a conversation.
    """
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids, mask
