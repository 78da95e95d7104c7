"""Tokens that end an answer: those that a model's files name, and the one that its chat template ends a message with."""

from __future__ import annotations

from typing import Any

from specache.templates.channels import ChannelTokens
from specache.templates.template import ChatTemplate, PromptError

_SAID = "Sentinel7Q"
_OTHER = "Another4Z"


def end_tokens(generation_config: Any, tokenizer: Any, template: ChatTemplate | None = None) -> list[int]:
    """Token ids that end an answer.

    Args:
        generation_config: of the model; fine-tunes often come with their base model's, which names another token.
        tokenizer: of the model.
        template: the chat template, where the prompt was written by it.
    """
    named = generation_config.eos_token_id
    ids = [] if named is None else [named] if isinstance(named, int) else list(named)
    ids.append(getattr(tokenizer, "eos_token_id", None))
    if template is not None and template.exists:
        ids += _end_of_message(template)
    return list(dict.fromkeys(int(token_id) for token_id in ids if token_id is not None))


def _end_of_message(template: ChatTemplate) -> list[int]:
    """The control tokens that the template writes right after the model's message, where it is the last one and where it is not.

    In templates with channels a message ends inside an answer too; there only the tokens that end the whole answer count.
    """
    channels = ChannelTokens.of(template.tokenizer)
    found = {_next_token(template, conversation) for conversation in _conversations()} - {None}
    if channels is not None:
        return sorted(channels.answer_ends | (found - {channels.end}))
    return sorted(found)


def _conversations() -> list[list[dict[str, str]]]:
    """An answer at the end of a conversation, and one with a message after it."""
    question, answer = {"role": "user", "content": _OTHER}, {"role": "assistant", "content": _SAID}
    return [[question, answer], [question, answer, question]]


def _next_token(template: ChatTemplate, messages: list[dict[str, str]]) -> Any:
    try:
        text = template.render(messages, answer_begins=False)
    except PromptError:  # some reject a conversation that ends so
        return None
    _, _, rest = text.rpartition(_SAID)
    found = template.tokens.found_in(rest)
    return template.tokens.all[found[0][1]] if found and not rest[: found[0][0]].strip() else None
