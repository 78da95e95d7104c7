"""Find what ends an answer: tokens and texts in a model's files, tokens in its chat template."""

from __future__ import annotations

from typing import Any

from specache.templates.channels import ChannelTokens
from specache.templates.template import ChatTemplate, PromptError

_ANSWER = "Sentinel7Q"
_QUESTION = "Another4Z"


def end_tokens(generation_config: Any, tokenizer: Any, template: ChatTemplate | None = None) -> list[int]:
    """Return the token ids that end an answer.

    Args:
        generation_config: the model's; fine-tunes often have their base model's, which names
            another token.
        tokenizer: the model's tokenizer.
        template: the chat template, if it rendered the prompt.
    """
    named = generation_config.eos_token_id
    ids = [] if named is None else [named] if isinstance(named, int) else list(named)
    ids.append(getattr(tokenizer, "eos_token_id", None))
    if template is not None and template.exists:
        ids += _end_of_message(template)
    return list(dict.fromkeys(int(token_id) for token_id in ids if token_id is not None))


def end_texts(generation_config: Any) -> list[str]:
    """Return the stop strings of a model's files, which end an answer and are no part of its text.

    Args:
        generation_config: the model's.
    """
    named = getattr(generation_config, "stop_strings", None) or []
    texts = [named] if isinstance(named, str) else list(named)
    return [text for text in texts if text]


def _end_of_message(template: ChatTemplate) -> list[int]:
    """Return the control tokens that the template writes directly after a model's message.

    In templates with channels a message ends inside an answer too. There only the tokens that end
    the whole answer count.
    """
    channels = ChannelTokens.of(template.tokenizer)
    found = {_next_token(template, conversation) for conversation in _conversations()} - {None}
    if channels is not None:
        return sorted(channels.answer_ends | (found - {channels.end}))
    return sorted(found)


def _conversations() -> list[list[dict[str, str]]]:
    """Return a conversation that ends with an answer, and one that continues after it."""
    question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    return [[question, answer], [question, answer, question]]


def _next_token(template: ChatTemplate, messages: list[dict[str, str]]) -> Any:
    try:
        text = template.render(messages, answer_begins=False)
    except PromptError:  # some templates reject a conversation that ends so
        return None
    _, _, rest = text.rpartition(_ANSWER)
    found = template.tokens.found_in(rest)
    return template.tokens.all[found[0][1]] if found and not rest[: found[0][0]].strip() else None
