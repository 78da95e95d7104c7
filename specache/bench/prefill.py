"""`prefill`: time and peak memory of a prefill, with SpeCache and with the ordinary cache.

Each implementation runs in a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, ClassVar

import torch

from specache.bench.base import BenchContext, Outcome, Result, check_at_least
from specache.bench.cache_options import CacheOptions
from specache.bench.prefill_worker import DYNAMIC, SPECACHE, Job, Reading, Worker
from specache.bench.timing import Timing


@dataclass(frozen=True, kw_only=True)
class Prefill(CacheOptions):
    """Prefill a random prompt in chunks of one size."""

    name: ClassVar[str] = "prefill"
    summary: ClassVar[str] = "time and peak memory of a prefill, against transformers' ordinary cache"
    uses_model: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        *("impl", "weights", "context", "chunk", "seconds", "spread", "tokens_per_s"),
        *("peak_bytes", "added_bytes", "vs_dynamic", "memory_vs_dynamic"),
    )
    context: int = field(default=4096, metadata={"help": "Tokens of the prompt."})
    chunk: int = field(default=1024, metadata={"help": "Prompt tokens per forward pass."})
    repeat: int = field(default=3, metadata={"help": "Rounds; each implementation reads the prompt once in each."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "context", "chunk", "repeat")
        self.config()

    def run(self, bench: BenchContext) -> Outcome:
        source = bench.model_source
        workers: dict[str, Worker] = {}
        readings: dict[str, list[Reading]] = {SPECACHE: [], DYNAMIC: []}
        try:
            for impl in readings:
                bench.log(f"Loading {source.name} for {impl}")
                config = replace(self.config(), prefill_chunk=self.chunk)
                job = Job(source, impl, config, self.context, torch.get_num_threads(), bench.seed)
                workers[impl] = Worker(job)
            for number in range(self.repeat):
                for impl in sorted(workers, reverse=number % 2 == 1):
                    bench.log(f"round {number + 1} of {self.repeat}: {impl} reads {self.context:,} tokens")
                    readings[impl].append(workers[impl].prefill())
        finally:
            for worker in workers.values():
                worker.close()
        return Outcome(self._results(readings, str(source.weights)))

    def _results(self, readings: dict[str, list[Reading]], weights: str) -> list[Result]:
        results = [self._result(impl, weights, ones) for impl, ones in readings.items()]
        stock = results[-1]
        for result in results:
            result["vs_dynamic"] = stock["seconds"] / result["seconds"]
            result["memory_vs_dynamic"] = result["added_bytes"] / stock["added_bytes"] if stock["added_bytes"] else None
        return results

    def _result(self, impl: str, weights: str, readings: list[Reading]) -> Result:
        timing = Timing(tuple(reading.seconds * 1e3 for reading in readings))
        peak: Any = median(reading.peak_bytes for reading in readings)
        return {
            "impl": impl,
            "weights": weights,
            "context": self.context,
            "chunk": self.chunk,
            "seconds": timing.ms / 1e3,
            "spread": [quartile / 1e3 for quartile in timing.spread],
            "tokens_per_s": self.context * 1e3 / timing.ms,
            "peak_bytes": int(peak),
            "added_bytes": int(peak) - readings[0].idle_bytes,
        }
