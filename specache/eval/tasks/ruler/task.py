"""The task `ruler`: RULER's 13 tasks at each length."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from specache.errors import ConfigError, TaskDataError
from specache.eval.methods.base import Session
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel, greedy
from specache.eval.tasks.ruler.filling import Encoder, Filler
from specache.eval.tasks.ruler.sample import Subtask
from specache.eval.tasks.ruler.scoring import SCORES, clean
from specache.eval.tasks.ruler.subtasks import SUBTASKS, Sources
from specache.eval.tasks.texts import check_at_least, check_distinct, check_length, json_settings, shared_prefix

_MOST_QUESTIONS = 10  # over one context: an essay has 40 places for needles, and one task asks for four at a time


@dataclass(frozen=True)
class Ruler:
    """All 13 tasks, or some, at each length.

    Raises:
        ConfigError: an option is out of range, or names no task of RULER.
    """

    name: ClassVar[str] = "ruler"
    summary: ClassVar[str] = "RULER: needles, variable tracking, frequent words and questions over documents, at any length"
    unit: ClassVar[str] = "score"

    tasks: tuple[str, ...] = field(default=(), metadata={"help": "Which of RULER's 13 tasks (default: all that have their files)."})
    lengths: tuple[int, ...] = field(default=(4096,), metadata={"help": "Prompt and answer together, in tokens."})
    samples: int = field(default=20, metadata={"help": "Items per task and length."})
    haystack: tuple[Path, ...] = field(default=(), metadata={"help": "Text files (default: Python's own documentation)."})
    qa1: Path | None = field(default=None, metadata={"help": "SQuAD's JSON file, for qa_1."})
    qa2: Path | None = field(default=None, metadata={"help": "HotpotQA's JSON file (distractor setting), for qa_2."})
    chat: bool = field(default=True, metadata={"help": "Ask as a user's message, if the model has a chat template."})
    questions: int = field(
        default=1, metadata={"help": "Questions over one context, in tasks with several keys, each an item (RULER: 1)."}
    )
    seed: int = field(default=0, metadata={"help": "Decides keys, values, words and places."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "lengths", "samples", "questions")
        for task in self.tasks:
            if task not in SUBTASKS:
                raise ConfigError(f"--tasks: RULER has no task {task!r}. It has {', '.join(SUBTASKS)}.")
        check_distinct(self, "tasks", "lengths")
        if self.questions > _MOST_QUESTIONS:
            raise ConfigError(f"--questions must be at most {_MOST_QUESTIONS}, got {self.questions}.")

    @property
    def left_out(self) -> tuple[str, ...]:
        """Return the tasks that do not run: nobody named them and their files are missing."""
        return () if self.tasks else tuple(self._without_corpus())

    def settings(self) -> dict[str, Any]:
        return json_settings(self)

    def items(self, model: TaskModel) -> Iterator[Item]:
        """Yield all items of each length and task.

        Raises:
            TaskDataError: a file is missing or malformed, or a task was named without its file.
            ConfigError: a length exceeds the model's positions, or is too short for a task.
        """
        sources = Sources(self.haystack, squad=self.qa1, hotpotqa=self.qa2)
        subtasks = {name: SUBTASKS[name](sources) for name in self._chosen()}
        for length in self.lengths:
            check_length(length, model.max_positions, "RULER")
            for name, subtask in subtasks.items():
                yield from self._items_of(model, name, subtask, length)

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        return Prepared(item, prompt)

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        """Score the greedy answer."""
        facts = prepared.item.facts
        score, references = SCORES[facts["score"]], facts["references"]

        def answer(tokens: list[int]) -> str:
            return clean(model.answer_text(tokens, prepared.item.prompt, chat=self.chat))

        tokens = greedy(
            prepared.prompt.logits,
            session,
            facts["max_new_tokens"],
            model.end_ids(chat=self.chat),
            finished=lambda tokens: score(answer(tokens), references) == 1.0,  # a longer answer never scores less
        )
        prediction = answer(tokens)
        return Measurement([score(prediction, references)], details={"prediction": prediction, "references": references})

    def _chosen(self) -> tuple[str, ...]:
        missing = self._without_corpus()
        for name in self.tasks:
            if name in missing:
                raise TaskDataError(f"RULER's {name} asks about the documents of {missing[name]}.")
        if self.left_out:
            files = " and ".join(missing.values())
            warnings.warn(f"RULER without {', '.join(self.left_out)}: they need {files}.", stacklevel=3)
        return self.tasks or tuple(name for name in SUBTASKS if name not in missing)

    def _without_corpus(self) -> dict[str, str]:
        """Return the tasks whose file is not given, and what to pass."""
        needed = {"qa_1": (self.qa1, "SQuAD (--qa1 FILE)"), "qa_2": (self.qa2, "HotpotQA (--qa2 FILE)")}
        return {name: wanted for name, (file, wanted) in needed.items() if file is None}

    def _items_of(self, model: TaskModel, name: str, subtask: Subtask, length: int) -> Iterator[Item]:
        filler = Filler(subtask, Encoder(model.template, chat=self.chat), name, length)
        made = 0
        while made < self.samples:
            filled = filler.fill(f"{self.seed}/{name}/{length}/{made}", min(self.questions, self.samples - made))
            shared = shared_prefix([prompt for _, prompt in filled])
            for question, prompt in filled:
                yield Item(
                    id=f"{name}/{length}/{made}",
                    group=name if len(self.lengths) == 1 else f"{name}/{length}",
                    prompt=prompt,
                    shared=shared,
                    facts={
                        "length": length,
                        "references": question.references,
                        "depths": question.depths,
                        "max_new_tokens": subtask.max_new_tokens,
                        "score": subtask.score.__name__,
                    },
                )
                made += 1
