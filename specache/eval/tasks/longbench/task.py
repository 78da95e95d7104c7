"""The task `longbench`: LongBench v1 (Bai et al. 2023), the 16 English tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from specache.errors import ConfigError, TaskDataError
from specache.eval.methods.base import Session
from specache.eval.prefilled import Prefilled
from specache.eval.tasks.base import Item, Measurement, Prepared, TaskModel, greedy
from specache.eval.tasks.longbench.data import Record, folder_reader, hub_reader
from specache.eval.tasks.longbench.metrics import classification
from specache.eval.tasks.longbench.prompt_texts import SUBSETS, Subset
from specache.eval.tasks.texts import check_at_least, check_distinct, encode_prompt, json_settings
from specache.templates.template import ChatTemplate

ANSWER_ROOM = 600  # positions kept free: the longest answer (512 tokens) and a chat template
LONGEST_PROMPT = 31_500  # the benchmark's own limit for models of 32k positions


@dataclass(frozen=True)
class LongBench:
    """LongBench's questions, summaries, few-shot, counting, retrieval and code tasks."""

    name: ClassVar[str] = "longbench"
    summary: ClassVar[str] = "LongBench v1: 16 English tasks, scored as the benchmark scores them"
    unit: ClassVar[str] = "score"
    subsets: tuple[str, ...] = field(default=tuple(SUBSETS), metadata={"help": "Which of the 16 tasks."})
    data: Path | None = field(default=None, metadata={"help": "Folder of LongBench's jsonl files (default: from the hub)."})
    limit: int = field(default=0, metadata={"help": "Examples of each task, the first ones (0: all)."})
    max_length: int = field(
        default=0,
        metadata={
            "help": "Longest prompt in tokens; longer ones lose their middle "
            f"(0: the model's positions less {ANSWER_ROOM}, at most {LONGEST_PROMPT:,})."
        },
    )
    chat: bool = field(
        default=True,
        metadata={"help": "Ask as a user's message, if the model has a chat template (never in few-shot and code tasks)."},
    )

    def __post_init__(self) -> None:
        check_at_least(self, 0, "limit", "max_length")
        check_distinct(self, "subsets")
        unknown = [name for name in self.subsets if name not in SUBSETS]
        if unknown or not self.subsets:
            raise ConfigError(f"--subsets: {', '.join(unknown) or 'none'} is not of LongBench's tasks: {', '.join(SUBSETS)}.")

    def settings(self) -> dict[str, Any]:
        return json_settings(self)

    def items(self, model: TaskModel) -> Iterator[Item]:
        read = hub_reader() if self.data is None else folder_reader(self.data)
        longest = self.longest_prompt(model.max_positions)
        for name in self.subsets:
            subset = SUBSETS[name]
            for index, record in islice(enumerate(read(name)), self.limit or None):
                if subset.metric is classification and not record.classes:
                    raise TaskDataError(f"{name}, example {index}: 'all_classes' is empty, but {name} is scored by it.")
                prompt = self._prompt(model.template, subset, record, longest)
                facts = {"subset": name, "references": record.answers, "classes": record.classes, "length": len(prompt)}
                yield Item(f"{name}/{index}", f"{self.name}/{name}", prompt, facts=facts)

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        return Prepared(item, prompt)

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        facts = prepared.item.facts
        subset = SUBSETS[facts["subset"]]
        chat = self.chat and subset.chat
        logits, end_ids = prepared.prompt.logits, model.end_ids(chat=chat)
        if subset.one_line:
            end_ids.append(model.tokenizer("\n", add_special_tokens=False)["input_ids"][-1])
            logits = _without(logits, end_ids)
        tokens = greedy(logits, session, subset.max_new_tokens, end_ids)
        prediction = model.answer_text(tokens, prepared.item.prompt, chat=chat)
        value = score(subset, prediction, facts["references"], facts["classes"])
        return Measurement([value], details={"prediction": prediction, "references": facts["references"]})

    def longest_prompt(self, positions: int | None) -> int:
        """Return the tokens that a prompt may have, without a chat template.

        Raises:
            ConfigError: the model has too few positions.
        """
        most = LONGEST_PROMPT if positions is None else positions - ANSWER_ROOM
        if most < 2:
            raise ConfigError(f"LongBench needs more than {ANSWER_ROOM} positions, the model has {positions}.")
        if self.max_length > most and positions is not None:
            raise ConfigError(f"--max-length can be at most {most:,} with this model, got {self.max_length:,}.")
        return self.max_length or min(most, LONGEST_PROMPT)

    def _prompt(self, template: ChatTemplate, subset: Subset, record: Record, longest: int) -> list[int]:
        text = subset.prompt.format(context=record.context, input=record.input)
        text = cut_middle(template.tokenizer, text, longest)
        return encode_prompt(template, text, chat=self.chat and subset.chat)


def cut_middle(tokenizer: Any, text: str, longest: int) -> str:
    """Return the text, or its first and last `longest / 2` tokens if it has more than `longest`."""
    ids = tokenizer(text)["input_ids"]
    if len(ids) <= longest:
        return text
    half = longest // 2
    beginning, end = ids[:half], ids[-half:]
    kept: str = tokenizer.decode(beginning, skip_special_tokens=True) + tokenizer.decode(end, skip_special_tokens=True)
    return kept


def score(subset: Subset, prediction: str, references: list[str], classes: list[str]) -> float:
    """Return the best score over all references."""
    if subset.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max(float(subset.metric(prediction, reference, classes)) for reference in references)


def _without(logits: Tensor, tokens: list[int]) -> Tensor:
    """Return logits [V] after which none of `tokens` can be chosen."""
    logits = logits.clone()
    logits[tokens] = float("-inf")
    return logits
