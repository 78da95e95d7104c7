"""Make samples as large as the length allows."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from specache.errors import ConfigError
from specache.eval.tasks.ruler.sample import Question, Subtask
from specache.eval.tasks.texts import encode_prompt
from specache.templates.template import ChatTemplate

_FIRST_SIZE = 100  # units of a task's first sample; the others start from the previous size
_CLOSE_ENOUGH = 0.01  # share of the length that may stay empty
_INTERPOLATIONS = 8  # sizes tried before the search falls back to halving


class Encoder:
    """Encodes a question, as a user's message if `chat` is set and there is a chat template."""

    def __init__(self, template: ChatTemplate, *, chat: bool) -> None:
        self._template = template
        self._chat = chat

    def __call__(self, question: Question) -> list[int]:
        """Return the token ids of the message and its answer's beginning, tokenised together."""
        return encode_prompt(self._template, question.text, chat=self._chat, answer_prefix=question.answer_prefix)


@dataclass(frozen=True)
class _Try:
    """A sample of some size, and the tokens of its longest prompt."""

    size: int
    tokens: int
    prompts: list[tuple[Question, list[int]]]


class Filler:
    """Samples of one task that fill one length.

    Tokens are almost linear in the size, so each try is where the line through the known sizes
    reaches the limit. A task's samples need about the same size, so the first try is the size of
    the sample before. Usually it is also the last.
    """

    def __init__(self, subtask: Subtask, encode: Encoder, name: str, length: int) -> None:
        self._subtask = subtask
        self._encode = encode
        self._name = name
        self._length = length
        self._limit = length - subtask.max_new_tokens
        self._size = _FIRST_SIZE

    def fill(self, key: str, questions: int) -> list[tuple[Question, list[int]]]:
        """Return questions over one context, with their prompts.

        The longest prompt is almost as long as fits.

        Args:
            key: seed of the sample.

        Raises:
            ConfigError: not even the smallest sample fits.
        """
        questions = self._subtask.questions(questions)
        smallest = self._subtask.smallest(questions)
        fits: _Try | None = None
        over: _Try | None = None
        size, tries = max(self._size, smallest), 0
        while fits is None or (self._is_loose(fits) and (over is None or over.size - fits.size > 1)):
            made, tries = self._try(key, size, questions), tries + 1
            if made.tokens <= self._limit:
                fits = made
            elif size > smallest:
                over = made
            else:
                least = made.tokens + self._subtask.max_new_tokens
                raise ConfigError(f"--lengths: RULER's {self._name} needs at least {least:,} tokens, got {self._length:,}.")
            size = max(smallest, _next_size(fits, over, self._limit, halve=tries > _INTERPOLATIONS))
        self._size = fits.size
        return fits.prompts

    def _try(self, key: str, size: int, questions: int) -> _Try:
        made = self._subtask.sample(Random(key), size, length=self._length, questions=questions)
        prompts = [(question, self._encode(question)) for question in made]
        return _Try(size, max(len(ids) for _, ids in prompts), prompts)

    def _is_loose(self, fits: _Try) -> bool:
        return self._limit - fits.tokens > _CLOSE_ENOUGH * self._limit


def _next_size(fits: _Try | None, over: _Try | None, limit: int, *, halve: bool) -> int:
    """Return the next size to try: between the two known ones, or beyond the only known one."""
    if fits and over:
        if halve:
            return (fits.size + over.size) // 2
        slope = (over.size - fits.size) / (over.tokens - fits.tokens)  # size per token
        return min(max(fits.size + int((limit - fits.tokens) * slope), fits.size + 1), over.size - 1)
    if fits:
        return fits.size + max(1, (limit - fits.tokens) * fits.size // fits.tokens)
    assert over is not None
    return min(over.size - 1, over.size * limit // over.tokens)
