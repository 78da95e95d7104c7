"""`paper`: the paper's efficiency table: the largest batch that fits, and its throughput."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

import specache
from specache.bench import kernel_backends
from specache.bench.base import BenchContext, Log, Outcome, Result, check_at_least, json_settings
from specache.bench.compute_device import CUDA
from specache.bench.environment import gpu
from specache.bench.paper_decoding import BatchResult, Decoding, Schedule, default_budget
from specache.bench.paper_methods import COPY_BITS, NAMES, Entry, entries
from specache.bench.plot import require_matplotlib, write_plot
from specache.bench.resumable import ResultFile
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.errors import ConfigError
from specache.planning.roofline.compared_methods import PAPER_RESIDUAL
from specache.platform import machine
from specache.platform.output_files import check_output_file

KEY = ("method", "bits", "policy", "context")


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Every method at every context, one after the other: each gets all of fast memory."""

    name: ClassVar[str] = "paper"
    summary: ClassVar[str] = "the largest batch that fits and its tokens per second: full cache, KIVI and SpeCache, at 1 and 2 bits"
    uses_model: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        *("context", "method", "policy", "bits", "batch", "fast_bytes", "ms_per_step", "spread", "tokens_per_s"),
        *("vs_full_batch", "vs_full_throughput", "hit_rate", "limited_by"),
    )
    contexts: tuple[int, ...] = field(
        default=(2048, 4096, 8192, 16384, 32768), metadata={"help": "Synthetic tokens per sequence, one table for each."}
    )
    methods: tuple[str, ...] = field(default=tuple(NAMES), metadata={"help": f"Any of {', '.join(NAMES)}."})
    bits: tuple[int, ...] = field(default=COPY_BITS, metadata={"help": "Bits per number of the low-bit copy: 1, 2."})
    fast_memory: int | None = field(
        default=None,
        metadata={
            "bytes": True,
            "help": "What the cache and a pass may take beside the weights (2GB, 512MiB). Default: 0.9 of what the GPU has free; "
            "on a CPU it must be given.",
        },
    )
    max_batch: int = field(default=1024, metadata={"help": "No larger batch is looked for."})
    group_size: int = field(default=64, metadata={"help": "Tokens (keys) or channels (values) that share a scale; divides 64."})
    top_k: int = field(default=64, metadata={"help": "16-bit pairs swapped in per key-value head and step."})
    chunk: int = field(default=1024, metadata={"help": "Prompt tokens per forward pass. What that needs counts on a CPU."})
    steps: int = field(default=8, metadata={"help": "Decode steps of a round."})
    rounds: int = field(default=5, metadata={"help": "Rounds; a time is their median."})
    search: bool = field(
        default=True,
        metadata={"help": "On a GPU, look for the largest batch by trying. Without, the planned one is decoded, or a smaller one."},
    )
    share_rows: bool = field(
        default=False,
        metadata={"help": "All sequences read the 16-bit rows of one, so that main memory limits no batch. A step does the same."},
    )
    out: Path | None = field(
        default=None,
        metadata={"help": "JSON file that is written after every result. The same command resumes an interrupted run."},
    )
    plot: Path | None = field(default=None, metadata={"help": "Draw batches and throughputs into this PNG file."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "contexts", "max_batch", "chunk", "steps", "rounds")
        if unknown := [name for name in self.methods if name not in NAMES]:
            raise ConfigError(f"--methods takes {', '.join(NAMES)}, got {', '.join(unknown)}.")
        if not self.methods:
            raise ConfigError(f"--methods names none. There are {', '.join(NAMES)}.")
        if not self.bits or any(bits not in COPY_BITS for bits in self.bits):
            raise ConfigError(f"--bits takes {', '.join(map(str, COPY_BITS))}, got {', '.join(map(str, self.bits)) or 'none'}.")
        self._config()
        if self.plot is not None:
            require_matplotlib()
        for option, path in (("out", self.out), ("plot", self.plot)):
            if path is not None:
                check_output_file(path, f"--{option}")

    def run(self, bench: BenchContext) -> Outcome:
        if self.fast_memory is None and bench.device != CUDA:
            raise ConfigError("On a CPU all memory is alike: say how much of it is to stand for fast memory, as --fast-memory 2GB.")
        file = ResultFile(self.out, self._identity(bench), KEY)
        remaining = [one for one in self._table_rows() if not file.has(*_key(*one))]
        total = len(list(self._table_rows()))
        if remaining:
            source = bench.model_source
            bench.log(f"Loading {source.name}")
            model = source.load()
            budget = file.kept.setdefault("fast_memory_bytes", self.fast_memory or default_budget())
            schedule = Schedule(self.steps, self.rounds, self.search, self.share_rows)
            with Decoding(model, budget, self.max_batch, schedule, bench.seed) as decoding:
                for number, (context, entry) in enumerate(remaining, start=total - len(remaining) + 1):
                    prefix = f"{number} of {total}: {entry.planned.title}, {context:,} tokens: "
                    measured = decoding.measure(entry, context, _prefixed(prefix, bench.log))
                    file.add(_result(entry, context, measured), compared)
        results = sorted(file.results, key=self._position)
        if self.plot is not None:
            self._draw(results, bench)
        return Outcome(results, file.kept)

    def _table_rows(self) -> Iterator[tuple[int, Entry]]:
        for context in sorted(set(self.contexts)):
            yield from ((context, entry) for entry in entries(self.methods, self.bits, self._config()))

    def _config(self) -> SpeCacheConfig:
        """Return what all methods share: 16-bit rows in RAM, copied to fast memory on demand."""
        return SpeCacheConfig(
            policy=Policy.VERIFIED,
            slow_tier=SlowTierKind.RAM,
            group_size=self.group_size,
            residual=PAPER_RESIDUAL,
            top_k=self.top_k,
            prefill_chunk=self.chunk,
        )

    def _position(self, result: Result) -> int:
        return [_key(*one) for one in self._table_rows()].index(tuple(result[name] for name in KEY))

    def _identity(self, bench: BenchContext) -> dict[str, Any]:
        """Return everything that the results depend on."""
        source = bench.model_source
        settings = {name: value for name, value in json_settings(self).items() if name not in ("out", "plot")}
        on_gpu = bench.device == CUDA
        return {
            "benchmark": self.name,
            "specache": specache.__version__,
            "model": source.name,
            "weights": str(source.weights),
            "machine": gpu()["name"] if on_gpu else machine.processor_name(),
            "threads": torch.get_num_threads(),
            "kernels": sorted(set(kernel_backends.active_on(bench.device).values())),
            "seed": bench.seed,
            **settings,
        }

    def _draw(self, results: list[Result], bench: BenchContext) -> None:
        from specache.bench.paper_plot import paper_figure

        assert self.plot is not None
        source = bench.model_source
        write_plot(self.plot.expanduser(), paper_figure(results, f"{source.name}, {source.weights}"))


def compared(results: list[Result]) -> list[Result]:
    """Add the ratios to the full cache at the same context.

    A ratio is `None` where either does not fit or was not measured.
    """
    full = {result["context"]: result for result in results if result["method"] == "full" and result["fits"]}
    for result in results:
        other = full.get(result["context"]) if result["fits"] else None
        result["vs_full_batch"] = None if other is None else result["batch"] / other["batch"]
        result["vs_full_throughput"] = None if other is None else result["tokens_per_s"] / other["tokens_per_s"]
    return results


def _prefixed(prefix: str, log: Log) -> Log:
    """Return a log whose messages begin with `prefix`."""
    return lambda message: log(prefix + message)


def _key(context: int, entry: Entry) -> tuple[Any, ...]:
    """Return a result's values of `KEY`."""
    return entry.method, entry.bits, entry.policy, context


def _result(entry: Entry, context: int, measured: BatchResult) -> Result:
    timing = measured.timing
    return {
        "method": entry.method,
        "bits": entry.bits,
        "policy": entry.policy,
        "context": context,
        "batch": measured.fit.batch,
        "fits": timing is not None,
        "found_by": measured.fit.found_by,
        "limited_by": measured.fit.limited_by,
        "ms_per_step": None if timing is None else timing.ms,
        "tokens_per_s": None if timing is None else measured.fit.batch * 1e3 / timing.ms,
        "spread": None if timing is None else timing.spread,
        "vs_full_batch": None,
        "vs_full_throughput": None,
        "fast_bytes": measured.fast_bytes,
        "hit_rate": measured.hit_rate,
        "skipped": measured.reason,
    }
