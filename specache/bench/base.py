"""The interface of a benchmark: its settings, its context and its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from specache.bench.compute_device import CPU
from specache.bench.shapes import ModelSource
from specache.errors import ConfigError

Log = Callable[[str], None]  # shows a progress message to the user
Result = dict[str, Any]  # one measurement, JSON-ready


@dataclass(frozen=True)
class BenchContext:
    """What a run is given in addition to the benchmark's own options.

    Attributes:
        source: the model, or `None` for a benchmark that uses none.
        seed: seed of synthetic keys, values, weights and prompts.
        device: `cpu` or `cuda`: where a benchmark without a model computes. `source` has its own.
        log: shows a progress message to the user.
    """

    source: ModelSource | None = None
    seed: int = 0
    device: str = CPU
    log: Log = lambda message: None

    @property
    def model_source(self) -> ModelSource:
        """Return the model's source.

        Raises:
            ConfigError: no model was named.
        """
        if self.source is None:
            raise ConfigError("This benchmark runs a whole model: name one with --model, or a shape with --shape.")
        return self.source


@dataclass(frozen=True)
class Outcome:
    """The results of a run.

    Attributes:
        results: one entry per implementation and setting. An entry that was not measured gives the
            reason under `skipped`.
        details: facts about the run as a whole (measured bandwidth, fitted lines). JSON-ready.
    """

    results: list[Result]
    details: dict[str, Any] = field(default_factory=dict)


class Benchmark(Protocol):
    """A frozen dataclass whose fields are the benchmark's options on the command line."""

    name: ClassVar[str]  # in the registry and on the command line
    summary: ClassVar[str]  # one line for `specache bench --help`
    uses_model: ClassVar[bool]  # whether it runs a whole model
    columns: ClassVar[tuple[str, ...]]  # keys of a result that the terminal shows

    def run(self, bench: BenchContext) -> Outcome:
        """Run the benchmark.

        Raises:
            SpeCacheError: it cannot be measured. The message says what to do.
        """


def document(benchmark: Benchmark, bench: BenchContext, outcome: Outcome, where: dict[str, Any], command: str) -> dict[str, Any]:
    """Return the JSON document that `--json` writes. Its keys are stable.

    Args:
        where: what `environment.describe()` returned before the run. Afterwards the machine's load
            includes our own.
    """
    source = bench.source
    return {
        "benchmark": benchmark.name,
        "settings": {**json_settings(benchmark), "seed": bench.seed},
        "model": None if source is None else {"name": source.name, "weights": str(source.weights)},
        "device": bench.device,
        "results": outcome.results,
        **outcome.details,
        **where,
        "command": command,
    }


def json_settings(benchmark: Any) -> dict[str, Any]:
    """Return the benchmark's options as plain values."""
    return {one.name: _plain(getattr(benchmark, one.name)) for one in dataclasses.fields(benchmark)}


def check_at_least(benchmark: Any, least: int, *names: str) -> None:
    """Raise `ConfigError` if an option or one of its values is below `least`, or empty."""
    for name in names:
        value = getattr(benchmark, name)
        values = value if isinstance(value, tuple) else (value,)
        if not values or min(values) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be {least} or more, got {_plain(value)}.")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, str | Path) else value
