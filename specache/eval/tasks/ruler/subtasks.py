"""The 13 tasks by name, with RULER's sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from specache.eval.tasks.ruler.counting import CommonWords, FrequentWords
from specache.eval.tasks.ruler.essay import Essay
from specache.eval.tasks.ruler.needles import Haystack, Kind, Needles
from specache.eval.tasks.ruler.qa import Corpus, QuestionAnswering, read_hotpotqa, read_squad
from specache.eval.tasks.ruler.sample import Subtask
from specache.eval.tasks.ruler.tracking import VariableTracking
from specache.eval.tasks.texts import load_text


@dataclass(frozen=True)
class Sources:
    """The files that tasks read. Each is read at most once, and only if a task needs it."""

    haystack: tuple[Path, ...]
    squad: Path | None
    hotpotqa: Path | None

    @cached_property
    def essay(self) -> Essay:
        """Return the text that hides the needles."""
        return Essay(load_text(self.haystack))

    @cached_property
    def squad_corpus(self) -> Corpus:
        """Return documents and questions of `qa_1`. It needs a file."""
        assert self.squad is not None
        return read_squad(self.squad)

    @cached_property
    def hotpotqa_corpus(self) -> Corpus:
        """Return documents and questions of `qa_2`. It needs a file."""
        assert self.hotpotqa is not None
        return read_hotpotqa(self.hotpotqa)


SUBTASKS: dict[str, Callable[[Sources], Subtask]] = {
    "niah_single_1": lambda sources: Needles(Haystack.NOISE),
    "niah_single_2": lambda sources: Needles(Haystack.ESSAY, essay=sources.essay),
    "niah_single_3": lambda sources: Needles(Haystack.ESSAY, value_kind=Kind.UUIDS, essay=sources.essay),
    "niah_multikey_1": lambda sources: Needles(Haystack.ESSAY, keys=4, several_questions=True, essay=sources.essay),
    "niah_multikey_2": lambda sources: Needles(Haystack.NEEDLES, several_questions=True),
    "niah_multikey_3": lambda sources: Needles(Haystack.NEEDLES, Kind.UUIDS, Kind.UUIDS, several_questions=True),
    "niah_multivalue": lambda sources: Needles(Haystack.ESSAY, values_per_key=4, essay=sources.essay),
    "niah_multiquery": lambda sources: Needles(
        Haystack.ESSAY, keys=4, keys_per_question=4, several_questions=True, essay=sources.essay
    ),
    "vt": lambda sources: VariableTracking(),
    "cwe": lambda sources: CommonWords(),
    "fwe": lambda sources: FrequentWords(),
    "qa_1": lambda sources: QuestionAnswering(sources.squad_corpus),
    "qa_2": lambda sources: QuestionAnswering(sources.hotpotqa_corpus),
}
