"""`tiers`: decode steps with the 16-bit rows in RAM and on a disk, with and without prefetch."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from specache.bench import greedy
from specache.bench.base import BenchContext, Log, Outcome, Result, check_at_least
from specache.bench.cache_options import TierOptions
from specache.bench.row_folder import row_folder
from specache.bench.timing import Timing
from specache.cache.cache import SpeCache
from specache.config import Policy, SlowTierKind
from specache.engine.attention_hook import attached
from specache.errors import ConfigError
from specache.stats import Counters
from specache.tiers.disk import probe

RAM = str(SlowTierKind.RAM)
TIERS = tuple(str(tier) for tier in SlowTierKind if tier is not SlowTierKind.AUTO)
_NOT_HERE = (Policy.AUTO, Policy.NONE, Policy.FULL)  # policies that fetch nothing, or stand for another policy
_COUNTED = ("rows_selected", "rows_ready", "read_s", "wait_s", "bytes_fetched")


@dataclass(frozen=True, kw_only=True)
class Tiers(TierOptions):
    """Greedy decoding of one prompt on each tier and under each policy, interleaved.

    The prompt is prefilled once per tier.
    """

    name: ClassVar[str] = "tiers"
    summary: ClassVar[str] = "time per step with rows in RAM and on a disk, with prefetch and without"
    uses_model: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        *("tier", "policy", "context", "ms_per_step", "spread", "vs_ram"),
        *("rows_ready", "read_hidden", "read_ms_per_step", "wait_ms_per_step", "hot_ratio"),
    )
    context: int = field(default=8000, metadata={"help": "Tokens of the prompt."})
    tiers: tuple[str, ...] = field(default=(RAM, str(SlowTierKind.DISK)), metadata={"help": f"Any of {', '.join(TIERS)}."})
    policies: tuple[str, ...] = field(
        default=(str(Policy.VERIFIED), str(Policy.ON_DEMAND)),
        metadata={"help": f"Any of {', '.join(policy for policy in Policy if policy not in _NOT_HERE)}."},
    )
    steps: int = field(default=32, metadata={"help": "Consecutive steps of each in a round."})
    rounds: int = field(default=3, metadata={"help": "Each tier and policy has one turn per round."})
    dir: Path | None = field(default=None, metadata={"help": "Folder of the disk tier. Default: the system's for temporary files."})
    text: Path | None = field(default=None, metadata={"help": "The prompt's file. Default: Python's documentation."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "context", "steps", "rounds")
        self.config()
        _check_among(self.tiers, TIERS, "tiers")
        _check_among(self.policies, [policy for policy in Policy if policy not in _NOT_HERE], "policies")

    def run(self, bench: BenchContext) -> Outcome:
        source = bench.model_source
        bench.log(f"Loading {source.name}")
        model = source.load()
        prompt = source.prompt(self.context, self.text, bench.seed)
        with ExitStack() as stack:
            folder = stack.enter_context(row_folder(self.dir))
            stack.enter_context(attached(model))
            turns: list[_Turn] = []
            for tier in dict.fromkeys(self.tiers):
                turns += self._turns(stack, model, tier, folder, prompt, bench.log)
            for number in range(self.rounds):
                bench.log(f"round {number + 1} of {self.rounds}: {self.steps} steps with each tier and policy")
                first = number % len(turns)
                for turn in turns[first:] + turns[:first]:
                    turn.run(self.steps)
            results = [turn.result(self.context) for turn in turns]
            reader = probe.report_for(folder)
        for result in results:
            result["vs_ram"] = _over_ram(result, results)
        return Outcome(results, {"disk_reader": {"name": reader.reader, "direct": reader.direct}})

    def _turns(self, stack: ExitStack, model: Any, tier: str, folder: Path, prompt: list[int], log: Log) -> list[_Turn]:
        """Prefill the prompt and fork its cache for every policy."""
        slow_dir = str(folder) if tier == SlowTierKind.DISK else None
        config = self.config(slow_tier=SlowTierKind(tier), slow_dir=slow_dir, policy=Policy(self.policies[0]))
        cache = stack.enter_context(SpeCache(model, config))
        first = greedy.read_prompt(
            model, cache, prompt, lambda done, total: log(f"tier {tier}: prompt, {done:,} of {total:,} tokens")
        )
        forks = [stack.enter_context(cache.fork(policy)) for policy in dict.fromkeys(self.policies)]
        return [_Turn(model, tier, fork, first) for fork in forks]


class _Turn:
    """One tier and policy: the times of its steps, and the reads counted meanwhile."""

    def __init__(self, model: Any, tier: str, cache: SpeCache, first: int) -> None:
        self._tier, self._cache = tier, cache
        self._steps = greedy.GreedySteps(model, cache, [first])
        self._samples_ms: list[float] = []
        self._counted = Counters()

    def run(self, steps: int) -> None:
        """Decode `steps` timed steps after an untimed one.

        The untimed step's rows were prefetched while the other caches ran.
        """
        self._steps.step()
        before = replace(self._cache.counters)
        for _ in range(steps):
            started = time.perf_counter()
            self._steps.step()
            self._samples_ms.append((time.perf_counter() - started) * 1e3)
        for name in _COUNTED:
            more = getattr(self._cache.counters, name) - getattr(before, name)
            setattr(self._counted, name, getattr(self._counted, name) + more)

    def result(self, context: int) -> Result:
        timing, counted, steps = Timing(tuple(self._samples_ms)), self._counted, len(self._samples_ms)
        copies = self._tier != SlowTierKind.RAM_INPLACE
        return {
            "tier": self._tier,
            "policy": str(self._cache.config.policy),
            "context": context,
            "ms_per_step": timing.ms,
            "spread": timing.spread,
            "vs_ram": None,
            "rows_ready": counted.rows_ready / counted.rows_selected if copies and counted.rows_selected else None,
            "read_hidden": max(0.0, 1 - counted.wait_s / counted.read_s) if counted.read_s else None,
            "read_ms_per_step": counted.read_s * 1e3 / steps,
            "wait_ms_per_step": counted.wait_s * 1e3 / steps,
            "fetched_bytes_per_step": counted.bytes_fetched // steps,
            "hot_ratio": self._cache.stats()["hot_ratio"],
        }


def _over_ram(result: Result, results: list[Result]) -> float | None:
    """Return a step's time over that of tier `ram` under the same policy."""
    ram = [other for other in results if other["tier"] == RAM and other["policy"] == result["policy"]]
    return result["ms_per_step"] / ram[0]["ms_per_step"] if ram else None


def _check_among(values: tuple[str, ...], known: Any, name: str) -> None:
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        raise ConfigError(f"--{name} takes {', '.join(known)}, got {', '.join(unknown) or 'nothing'}.")
