"""Make samples as large as the length allows."""

from __future__ import annotations

from random import Random

from specache.errors import ConfigError
from specache.eval.tasks.fitting import largest_that_fits
from specache.eval.tasks.ruler.sample import Question, Subtask
from specache.eval.tasks.texts import encode_prompt
from specache.templates.template import ChatTemplate

_FIRST_SIZE = 100  # units of a task's first sample; the others start from the previous size


class Encoder:
    """Encodes a question, as a user's message if `chat` is set and there is a chat template."""

    def __init__(self, template: ChatTemplate, *, chat: bool) -> None:
        self._template = template
        self._chat = chat

    def __call__(self, question: Question) -> list[int]:
        """Return the token ids of the message and its answer's beginning, tokenised together."""
        return encode_prompt(self._template, question.text, chat=self._chat, answer_prefix=question.answer_prefix)


class Filler:
    """Samples of one task that fill one length.

    A task's samples need about the same size, so the first try is the size of the sample before.
    Usually it is also the last.
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
        made: dict[int, list[tuple[Question, list[int]]]] = {}

        def tokens(size: int) -> int:
            sample = self._subtask.sample(Random(key), size, length=self._length, questions=questions)
            made[size] = [(question, self._encode(question)) for question in sample]
            return max(len(ids) for _, ids in made[size])

        size = largest_that_fits(tokens, self._limit, smallest=smallest, first=self._size)
        if size is None:
            least = max(len(ids) for _, ids in made[smallest]) + self._subtask.max_new_tokens
            raise ConfigError(f"--lengths: RULER's {self._name} needs at least {least:,} tokens, got {self._length:,}.")
        self._size = size
        return made[size]
