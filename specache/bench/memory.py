"""`memory`: a long prompt under a memory limit, over the disk tier and over the ordinary cache."""

from __future__ import annotations

import signal
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from specache.bench.base import BenchContext, Outcome, Result, check_at_least
from specache.bench.cache_options import TierOptions
from specache.bench.child import Child, ChildEnded
from specache.bench.compute_device import CPU
from specache.bench.control_group import MemoryGroup
from specache.bench.environment import gigabytes
from specache.bench.memory_worker import Job, serve
from specache.bench.prefill_worker import DYNAMIC, SPECACHE
from specache.bench.row_folder import row_folder
from specache.bench.timing import Timing
from specache.cache.sizes import ordinary_bytes
from specache.config import Policy, SlowTierKind
from specache.errors import ConfigError
from specache.model.dimensions import ModelDimensions

BASELINE_TOKENS = 1000
BASELINES = 2  # the lower peak counts: the first run also pays for the file's page cache


@dataclass(frozen=True, kw_only=True)
class Memory(TierOptions):
    """The disk tier and the ordinary cache under a memory limit that the kernel enforces.

    The limit is the disk tier's own peak over a short prompt, plus a part of the long prompt's
    16-bit cache.
    """

    name: ClassVar[str] = "memory"
    summary: ClassVar[str] = "a context larger than memory: the disk tier and the ordinary cache under a real limit (needs root)"
    uses_model: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        *("method", "context", "limit_bytes", "room_bytes", "cache_bytes", "completed", "read_tokens"),
        *("peak_bytes", "ms_per_step", "spread"),
    )
    context: int = field(default=65536, metadata={"help": "Tokens of the long prompt."})
    times: float = field(default=4.0, metadata={"help": "Its 16-bit cache over the room: the limit less the peak at 1,000 tokens."})
    short: int | None = field(
        default=None, metadata={"help": "A prompt that fits the ordinary cache. Default: an eighth of the long."}
    )
    chunk: int = field(default=1024, metadata={"help": "Prompt tokens per forward pass."})
    steps: int = field(default=16, metadata={"help": "Timed decode steps after the prompt."})
    policy: Policy = field(default=Policy.VERIFIED, metadata={"help": "Which pairs are swapped in, and when they are fetched."})
    dir: Path | None = field(default=None, metadata={"help": "Folder of the disk tier. Default: the system's for temporary files."})
    text: Path | None = field(default=None, metadata={"help": "A real model's prompt. Default: Python's documentation."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "context", "times", "chunk", "steps")
        if self.short is not None:
            check_at_least(self, 1, "short")
        if self.context <= BASELINE_TOKENS:
            raise ConfigError(f"--context must be more than {BASELINE_TOKENS:,} tokens, got {self.context:,}.")
        self.config()

    def run(self, bench: BenchContext) -> Outcome:
        if bench.device != CPU:
            raise ConfigError("bench memory limits main memory, which is not where a GPU computes. Run it with --device cpu.")
        with row_folder(self.dir) as folder:
            bases = [self._measure(bench, folder, SPECACHE, BASELINE_TOKENS, None) for _ in range(BASELINES)]
            base, model = min(bases, key=lambda measured: measured[0]["peak_bytes"])
            room = int(ordinary_bytes(model, self.context) / self.times)
            limit = base["peak_bytes"] + room
            runs = ((SPECACHE, self.context), (DYNAMIC, self.short or self.context // 8), (DYNAMIC, self.context))
            results = [base] + [self._measure(bench, folder, method, context, limit)[0] for method, context in runs]
        for result in results:
            result["cache_bytes"] = ordinary_bytes(model, result["context"])
            result["room_bytes"] = None if result["limit_bytes"] is None else room
        return Outcome(results)

    def _measure(
        self, bench: BenchContext, folder: Path, method: str, context: int, limit: int | None
    ) -> tuple[Result, ModelDimensions]:
        """Measure one method in a process of its own, until its last step or its end."""
        source = bench.model_source
        config = self.config(policy=self.policy, slow_tier=SlowTierKind.DISK, slow_dir=str(folder), prefill_chunk=self.chunk)
        job = Job(source, method, config, context, self.text, self.steps, torch.get_num_threads(), bench.seed)
        what = f"{method}, {context:,} tokens, {'no limit' if limit is None else f'limit {gigabytes(limit)}'}"
        bench.log(f"{what}: loading {source.name}")
        read, timing = 0, None
        with MemoryGroup() as group, closing(Child(serve, job, group.entered())) as child:
            model: ModelDimensions = child.receive()
            group.forget_peak()
            if limit is not None:
                group.limit(limit)
            try:
                child.send(True)
                while isinstance(answer := child.receive(), int):
                    read = answer
                    bench.log(f"{what}: {read:,} read, {gigabytes(group.peak)} at most")
                timing = Timing(tuple(answer))
            except ChildEnded as ended:
                if ended.exit_code != -signal.SIGKILL or limit is None:
                    raise
            return _result(method, limit, context, read, group.peak, timing), model


def _result(method: str, limit: int | None, context: int, read: int, peak: int, timing: Timing | None) -> Result:
    return {
        "method": method,
        "limit_bytes": limit,
        "context": context,
        "completed": timing is not None,
        "read_tokens": read,
        "peak_bytes": peak,
        "ms_per_step": None if timing is None else timing.ms,
        "spread": None if timing is None else timing.spread,
    }
