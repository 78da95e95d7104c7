"""Run every item of a task under every method that has not finished it yet.

All methods of an item share its prefill.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from specache import __version__
from specache.engine.attention_hook import attached
from specache.errors import EvaluationError, MethodUnavailableError, SpeCacheError
from specache.eval.methods.base import Session
from specache.eval.methods_option import NamedMethod, check_unique
from specache.eval.origin import describe_origin
from specache.eval.prefilled import Prefilled
from specache.eval.results import WEIGHTS_DIGEST, Cell, ResultFolder, Run, open_results
from specache.eval.table_rows import Row, aggregate
from specache.eval.tasks.base import Item, Measurement, Prepared, Task, TaskModel
from specache.model.identity.content import adapters_digest, weights_digest
from specache.model.info import inspect_model


class Progress:
    """Shows a run's progress. This class shows nothing; subclass it."""

    def begin(self, cells: int, done: int) -> None:
        """Start a run of `cells` cells, of which `done` were finished earlier."""

    def prefill(self, item: str, done: int, total: int) -> None:
        """Show that `done` of the prompt's `total` tokens are prefilled."""

    def cell(self, item: str, method: str) -> None:
        """Show that a method starts on an item."""

    def finished(self, cells: int = 1) -> None:
        """Show that `cells` more cells are finished, or will not be measured."""

    def skipped(self, method: str, reason: str) -> None:
        """Show that a method cannot run here, or failed and is left out from now on."""


@dataclass(frozen=True)
class Outcome:
    """All results in the folder after a run."""

    run: Run
    rows: list[Row]
    cells: list[Cell]

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `--json` writes. Its keys are stable."""
        return {"rows": self.rows, "run": self.run.to_dict()}


class MethodFailedError(EvaluationError):
    """Methods failed; the others were measured to the end.

    Attributes:
        outcome: all results in the folder, those of the failed methods up to their errors included.
    """

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.outcome), self.__dict__


def describe_run(model: TaskModel, task: Task, methods: list[NamedMethod], seed: int) -> Run:
    """Return what identifies a run's results, and where they are measured from now on."""
    info = inspect_model(model.model)
    identity = {
        "task": task.name,
        "settings": task.settings(),
        "model": model.name,
        "fingerprint": info.fingerprint,
        WEIGHTS_DIGEST: _weights(model.model),
        "dtype": str(info.dtype).removeprefix("torch."),
        "specache": __version__,
        "seed": seed,
    }
    if model.weights is not None:
        identity["weights"] = model.weights
    if model.variables:
        identity["chat_template_kwargs"] = model.variables
    if model.system is not None:
        identity["system"] = model.system
    labelled = {method.label: {"name": method.name, "settings": method.settings} for method in methods}
    return Run(identity, task.unit, labelled, origins=[describe_origin()], began=(model.date or datetime.now()).isoformat())


def evaluate(
    model: TaskModel, task: Task, methods: list[NamedMethod], out: Path, *, seed: int = 0, progress: Progress | None = None
) -> Outcome:
    """Measure the cells that `out` does not hold yet.

    An interrupt or an error loses only the cell in progress. A method that fails is left out from
    then on, and the others are measured to the end.

    Raises:
        ConfigError: the same method twice.
        TaskDataError: a file of the task is missing or malformed. This is found before anything is
            measured.
        EvaluationError: `out` holds another run, or other items under the same names; it cannot be
            written or is in use; or no method can run here.
        MethodFailedError: methods failed; the message names them and their items.
    """
    check_unique(methods)
    with open_results(out, describe_run(model, task, methods, seed)) as results:
        torch.manual_seed(seed)
        if results.run.began is not None:
            model = replace(model, date=datetime.fromisoformat(results.run.began))
        failed = _Runner(model, task, methods, results, progress or Progress()).run()
        outcome = Outcome(results.run, aggregate(results.run, results.cells), results.cells)
        if failed:
            raise MethodFailedError(_goes_on("; ".join(failed)), outcome)
        if not results.cells and results.run.skipped:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in results.run.skipped.items())
            raise EvaluationError(f"none of the methods can run here: {reasons}")
        return outcome


class _Runner:
    def __init__(self, model: TaskModel, task: Task, methods: list[NamedMethod], results: ResultFolder, progress: Progress) -> None:
        self._model = model
        self._task = task
        self._methods = list(methods)
        self._results = results
        self._progress = progress
        self._remaining = {method.label: 0 for method in methods}  # label -> cells still to be measured
        self._failed: list[str] = []

    def run(self) -> list[str]:
        """Measure what is left. Return what failed: item, method and reason."""
        with torch.no_grad(), attached(self._model.model), _PrefilledPrompts(self._model.model, self._needs_queries()) as prompts:
            self._check_items()
            for index, item in enumerate(self._task.items(self._model)):
                if todo := [method for method in self._methods if not self._results.has(item.id, method.label)]:
                    self._item(index, item, todo, prompts)
        return self._failed

    def _check_items(self) -> None:
        """Check all items before any is measured, and count the remaining cells.

        Malformed data is thus found at once, not after hours. So is an item that is no longer what
        it was when cells of it were measured: methods are compared on the same items.
        """
        seen: set[str] = set()
        measured = {cell["item"]: cell for cell in self._results.cells}
        for item in self._task.items(self._model):
            if item.id in seen:
                raise EvaluationError(f"the task {self._task.name!r} has two items called {item.id!r}.")
            if not item.prompt:
                raise EvaluationError(f"item {item.id!r} of the task {self._task.name!r} has an empty prompt.")
            if item.id in measured:
                self._check_same(item, measured[item.id])
            seen.add(item.id)
            for label in self._remaining:
                self._remaining[label] += not self._results.has(item.id, label)
        if not seen:
            raise EvaluationError(f"the task {self._task.name!r} has no items with these options.")
        cells = len(seen) * len(self._methods)
        self._progress.begin(cells, cells - sum(self._remaining.values()))

    def _check_same(self, item: Item, cell: Cell) -> None:
        """Check that an item is the one that a cell was measured on.

        Cells of earlier versions tell only how long its prompt was.
        """
        tokens = cell.get("prompt_tokens", len(item.prompt))
        if tokens != len(item.prompt) or cell.get("content", _content(item)) != _content(item):
            raise EvaluationError(
                f"item {item.id!r} in {self._results.folder} was measured on another prompt ({tokens:,} tokens then, "
                f"{len(item.prompt):,} now) or other references. A file that the task reads has changed, or the tokenizer, or "
                "the code that makes the items. Nothing was changed. Choose another --out."
            )

    def _needs_queries(self) -> bool:
        return any(method.method.needs_all_queries for method in self._methods)

    def _item(self, index: int, item: Item, todo: list[NamedMethod], prompts: _PrefilledPrompts) -> None:
        try:
            prompt = prompts.get(item, lambda done, total: self._progress.prefill(item.id, done, total))
            prepared = self._task.prepare(self._model, item, prompt)
        except Exception as error:
            raise EvaluationError(_goes_on(f"item {item.id!r}: {_reason(error)}")) from error
        for method in todo:
            self._progress.cell(item.id, method.label)
            try:
                cell = self._cell(index, prepared, method)
            except MethodUnavailableError as error:
                self._drop(method, str(error))
                continue
            except Exception as error:
                self._drop(method, f"it failed at item {item.id!r} ({_reason(error)})")
                self._failed.append(f"item {item.id!r}, method {method.label!r}: {_reason(error)}")
                continue
            self._results.append(cell)
            self._remaining[method.label] -= 1
            self._progress.finished()

    def _cell(self, index: int, prepared: Prepared, method: NamedMethod) -> Cell:
        began = time.perf_counter()
        session: Session = method.method.start(prepared.prompt)
        try:
            measurement = self._task.measure(self._model, prepared, session)
            stats = session.stats()
        finally:
            session.close()
        _check(measurement)
        return {
            "item": prepared.item.id,
            "group": prepared.item.group,
            "index": index,
            "prompt_tokens": len(prepared.item.prompt),
            "content": _content(prepared.item),
            "method": method.label,
            "values": measurement.values,
            "tokens": measurement.tokens,
            "details": measurement.details,
            "facts": prepared.item.facts,
            "stats": asdict(stats),
            "seconds": time.perf_counter() - began,
        }

    def _drop(self, method: NamedMethod, reason: str) -> None:
        self._methods.remove(method)
        self._results.skip(method.label, reason)
        self._progress.skipped(method.label, reason)
        self._progress.finished(self._remaining.pop(method.label))


class _PrefilledPrompts(ExitStack):
    """Prefilled prompts, of which one is held at a time.

    Equal prompts share a prefill, and items that share a prefix share the prefill of it.
    """

    def __init__(self, model: Any, all_queries: bool) -> None:
        super().__init__()
        self._model = model
        self._all_queries = all_queries
        self._shares = inspect_model(model).rope_switch is None  # else a longer prompt may need another RoPE
        self._prefix: Prefilled | None = None
        self._current: Prefilled | None = None
        self.callback(self._close)

    def get(self, item: Item, progress: Any) -> Prefilled:
        """Return the item's prefilled prompt. It is closed by the next call."""
        if self._current is not None and self._current.token_ids == item.prompt:
            return self._current
        self._drop_current()
        prefix = self._shared_prefix(item, progress)
        self._current = Prefilled(self._model, item.prompt, all_queries=self._all_queries, like=prefix, progress=progress)
        return self._current

    def _shared_prefix(self, item: Item, progress: Any) -> Prefilled | None:
        """Return the prefill of what the item shares with its neighbours, or `None`.

        At least one token is left to run after it.
        """
        ids = item.prompt[: min(item.shared, len(item.prompt) - 1)] if self._shares else []
        if self._prefix is not None and self._prefix.token_ids != ids:
            self._prefix.close()
            self._prefix = None
        if self._prefix is None and ids:
            self._prefix = Prefilled(self._model, ids, all_queries=self._all_queries, progress=progress)
        return self._prefix

    def _drop_current(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None

    def _close(self) -> None:
        self._drop_current()
        if self._prefix is not None:
            self._prefix.close()
            self._prefix = None


def _weights(model: Any) -> str:
    """Return a digest of a model's weights and active adapters."""
    return hashlib.sha256(f"{weights_digest(model)} {adapters_digest(model)}".encode()).hexdigest()


def _content(item: Item) -> str:
    """Return a digest of what an item asks and expects."""
    described = json.dumps([item.group, item.prompt, item.facts], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _check(measurement: Measurement) -> None:
    for name, figures in _series(measurement):
        if not all(math.isfinite(value) for value in figures):
            raise EvaluationError(f"a figure of {name!r} is not a finite number")
        if name != "values" and figures and len(figures) != len(measurement.values):
            raise EvaluationError(f"{name!r} has {len(figures)} figures for {len(measurement.values)} values")


def _series(measurement: Measurement) -> Iterator[tuple[str, list[float]]]:
    yield "values", measurement.values
    yield from measurement.tokens.items()


def _reason(error: Exception) -> str:
    """Return what an error says, with its type if it is not ours."""
    reason = str(error) if isinstance(error, SpeCacheError) else f"{type(error).__name__}: {error}"
    return reason.strip().rstrip(".")


def _goes_on(failed: str) -> str:
    return f"{failed}. Finished cells are kept; the same command goes on from here."
