"""How long an answer can be: what was asked for, and what the model's positions leave after the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from specache.errors import UsageError

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Room:
    """The longest answer to a prompt.

    Attributes:
        new_tokens: its length.
        shortened: why it is shorter than what was asked for, or than the default; `None` where it is not.
        asked: the length was asked for, so that its shortening is news whether or not the answer gets there.
    """

    new_tokens: int
    shortened: str | None = None
    asked: bool = False

    def note(self, reached: bool) -> str | None:
        """Return what the user should know; `reached`: an answer ended at this length."""
        return self.shortened if reached or self.asked else None


def room(max_new_tokens: int | None, positions: int | None, prompt_tokens: int) -> Room:
    """Return the longest answer after a prompt.

    Args:
        max_new_tokens: what was asked for; `None` is the default.
        positions: of the model; `None` has no limit.
        prompt_tokens: of the longest prompt.

    Raises:
        UsageError: the prompt fills the model.
    """
    wanted = DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if positions is None:
        return Room(wanted)
    left = positions - prompt_tokens
    if left <= 0:
        raise UsageError(
            f"The prompt has {prompt_tokens:,} tokens but the model has positions for {positions:,}, the answer's among them. "
            "Shorten the prompt, or use a model with a longer context."
        )
    if wanted <= left:
        return Room(wanted)
    shortened = (
        f"The model has {positions:,} positions and the prompt takes {prompt_tokens:,}: an answer can have {left:,} new tokens "
        f"at most, not {wanted:,}."
    )
    return Room(left, shortened, max_new_tokens is not None)
