"""Where prompts come from, and what conversations they make."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specache.errors import ConfigError
from specache.platform.text_files import check_text, read_stream, read_text
from specache.templates.template import ChatTemplate, Message, PromptError

if TYPE_CHECKING:
    import torch

STDIN = "-"


@dataclass(frozen=True)
class Prompt:
    """One text and where it came from."""

    text: str
    origin: str


def read_prompts(text: str | None, files: list[Path]) -> list[Prompt]:
    """The prompts of one call: the text, or the files, or else what is piped in.

    Raises:
        ConfigError: both a text and files, or neither of them and nothing piped in.
        PromptError: a file that cannot be read, or an empty prompt.
    """
    if text is not None and files:
        raise ConfigError(
            "--prompt and --prompt-file exclude each other. To ask about a file, pipe both in: "
            "(cat FILE; echo; echo QUESTION) | specache generate"
        )
    if [str(file) for file in files].count(STDIN) > 1:
        raise ConfigError(
            "--prompt-file - was given twice, but standard input can be read only once. Save one of the prompts in a file."
        )
    if text is not None:
        prompts = [Prompt(check_text(text, "the text of --prompt", PromptError), "--prompt")]
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


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how its model's conversations are written."""
    return ChatTemplate(tokenizer).exists


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as it is, with the tokenizer's own first token. Special tokens in it are special tokens: whoever writes
    for the model itself (`--raw`) writes them.
    """
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def asked(text: str, system: str | None = None) -> list[Message]:
    """A conversation of one question."""
    return [*system_message(system), {"role": "user", "content": text}]


def answered(messages: list[Message], text: str) -> list[Message]:
    """A conversation and the model's answer."""
    return [*messages, {"role": "assistant", "content": text}]


def system_message(system: str | None) -> list[Message]:
    """The beginning of a conversation: one message, or none."""
    return [] if system is None else [{"role": "system", "content": system}]


def pad_left(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids [B, S]` and `attention_mask [B, S]` of prompts of different lengths.

    The mask is never left to be guessed: many models pad with a token that also ends every message of a conversation.
    """
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids, mask
