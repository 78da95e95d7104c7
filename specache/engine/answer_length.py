"""Compute the longest answer: the requested length, limited by the model's positions."""

from __future__ import annotations

from dataclasses import dataclass

from specache.errors import UsageError

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class AnswerLimit:
    """The longest answer to a prompt.

    Attributes:
        new_tokens: its length.
        shortened: why it is shorter than requested, or than the default; None if it is not.
        asked: the length was requested, so a shortening is reported even if the answer ends
            earlier.
    """

    new_tokens: int
    shortened: str | None = None
    asked: bool = False

    def note(self, reached: bool) -> str | None:
        """Return a note for the user, or None. `reached`: an answer ended at this length."""
        return self.shortened if reached or self.asked else None


def answer_limit(max_new_tokens: int | None, positions: int | None, prompt_tokens: int) -> AnswerLimit:
    """Return the longest answer after a prompt.

    Args:
        max_new_tokens: requested length; None is the default.
        positions: positions of the model; None is unlimited.
        prompt_tokens: length of the longest prompt.

    Raises:
        UsageError: the prompt fills the model.
    """
    wanted = DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if positions is None:
        return AnswerLimit(wanted)
    left = positions - prompt_tokens
    if left <= 0:
        raise UsageError(
            f"The prompt has {prompt_tokens:,} tokens but the model has positions for {positions:,}, the answer's among them. "
            "Shorten the prompt, or use a model with a longer context."
        )
    if wanted <= left:
        return AnswerLimit(wanted)
    shortened = (
        f"The model has {positions:,} positions and the prompt takes {prompt_tokens:,}: an answer can have {left:,} new tokens "
        f"at most, not {wanted:,}."
    )
    return AnswerLimit(left, shortened, max_new_tokens is not None)
