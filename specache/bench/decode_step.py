"""`decode`: a whole model's tokens per second over long synthetic contexts, and a step's phases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from specache.bench.base import BenchContext, Outcome, Result, check_at_least
from specache.bench.breakdown import PHASES
from specache.bench.cache_options import CacheOptions
from specache.bench.compare import Measured, Skipped, compare
from specache.bench.compute_device import CPU
from specache.bench.contenders import BareModel, Contender, DynamicContender, QuantizedContender, SpeCacheContender
from specache.bench.timing import Timing
from specache.bench.workload import Workload
from specache.engine.compiled import compile_decode
from specache.errors import BenchmarkError, ConfigError

DYNAMIC, QUANTIZED, LLAMA_CPP = "dynamic", "quantized", "llama.cpp"
AGAINST = (DYNAMIC, QUANTIZED, LLAMA_CPP)
LLAMA_CPP_CACHES = ("f16", "q8_0", "q4_0")
PHASE_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Decode(CacheOptions):
    """Decode steps of a whole model with SpeCache and with other caches of the same weights."""

    name: ClassVar[str] = "decode"
    summary: ClassVar[str] = "tokens per second of a whole model, against transformers' caches and llama.cpp"
    uses_model: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        *("impl", "weights", "cache", "batch", "context", "ms_per_step", "spread", "tokens_per_s"),
        *("vs_dynamic", "breakdown"),
    )
    context: int = field(default=32768, metadata={"help": "Synthetic tokens per sequence."})
    batch: int = field(default=1, metadata={"help": "Sequences decoded together."})
    against: tuple[str, ...] = field(default=(DYNAMIC,), metadata={"help": f"What to compare with: {', '.join(AGAINST)}."})
    steps: int = field(default=10, metadata={"help": "Timed steps of each; they are interleaved."})
    compile: bool = field(default=False, metadata={"help": "Compile our decode step first (half a minute the first time)."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "context", "batch", "steps")
        self.config()
        unknown = set(self.against) - set(AGAINST)
        if unknown:
            raise ConfigError(f"--against takes {', '.join(AGAINST)}, got {', '.join(sorted(unknown))}.")

    def run(self, bench: BenchContext) -> Outcome:
        source = bench.model_source
        bench.log(f"Loading {source.name}")
        work = Workload(source.load(), self.batch, self.context, bench.seed)
        if self.compile:
            compile_decode(work.model)
        ours = SpeCacheContender(work, self.config())
        contenders: list[Contender] = [ours]
        skipped = {}
        for name in (name for name in self.against if name != LLAMA_CPP):
            try:
                contenders.append(DynamicContender(work) if name == DYNAMIC else QuantizedContender(work, self.bits))
            except ConfigError as error:
                skipped[name] = str(error)
        bare = {rows: BareModel(work, rows) for rows in ((1, 2) if ours.config.policy.drafts else (1,))}
        measured = compare(work, [*contenders, *bare.values()], self.steps, bench.log, PHASE_STEPS)
        weights = {rows: _ms(measured[contender]) for rows, contender in bare.items()}
        results = [self._result(contender, measured[contender], weights, source.weights) for contender in contenders]
        results += [self._empty(name, "", source.weights, reason) for name, reason in skipped.items()]
        del work, contenders, ours, bare, measured  # llama.cpp loads the model again
        if LLAMA_CPP in self.against and bench.device != CPU:
            reason = "it is measured on the CPU only. Use --device cpu"
            results += [self._empty(LLAMA_CPP, cache, source.weights, reason) for cache in LLAMA_CPP_CACHES]
        elif LLAMA_CPP in self.against:
            results += self._llama_cpp(bench)
        return Outcome(_compared(results), {"model_ms": {str(rows): ms for rows, ms in weights.items()}})

    def _result(self, contender: Contender, measured: Measured | Skipped, weights: dict[int, float | None], format: str) -> Result:
        if isinstance(measured, Skipped):
            return self._empty(contender.impl, contender.cache, format, measured.reason)
        rows = 2 if isinstance(contender, SpeCacheContender) and contender.config.policy.drafts else 1
        breakdown = _breakdown(measured, weights[rows])
        return self._timed(contender.impl, contender.cache, format, measured.timing, breakdown, measured.interleaved)

    def _llama_cpp(self, bench: BenchContext) -> Iterator[Result]:
        source = bench.model_source
        weights = str(source.weights) if source.shape else "file"  # a .gguf file has weights of its own
        for cache in LLAMA_CPP_CACHES:
            bench.log(f"llama.cpp with {cache} cache")
            try:
                samples = llama_cpp_steps(
                    source.shape or source.gguf or source.name, self.context, self.batch, str(source.weights), cache, self.steps
                )
            except BenchmarkError as error:
                yield self._empty(LLAMA_CPP, cache, weights, str(error))
            else:
                yield self._timed(LLAMA_CPP, cache, weights, Timing(tuple(samples)), None, False)

    def _timed(
        self, impl: str, cache: str, format: str, timing: Timing, breakdown: dict[str, float] | None, interleaved: bool
    ) -> Result:
        return {
            **self._empty(impl, cache, format, None),
            "ms_per_step": timing.ms,
            "spread": timing.spread,
            "tokens_per_s": self.batch * 1e3 / timing.ms,
            "breakdown": breakdown,
            "interleaved": interleaved,
        }

    def _empty(self, impl: str, cache: str, format: str, reason: str | None) -> Result:
        return {
            "impl": impl,
            "weights": str(format),
            "cache": cache,
            "batch": self.batch,
            "context": self.context,
            "ms_per_step": None,
            "spread": None,
            "tokens_per_s": None,
            "vs_dynamic": None,
            "breakdown": None,
            "interleaved": None,
            "skipped": reason,
        }


def llama_cpp_steps(model: Any, context: int, batch: int, weights: str, cache_type: str, steps: int) -> list[float]:
    """Return the milliseconds of `steps` decode steps of llama.cpp.

    Args:
        model: a `Shape`, or the model's name as the user wrote it.

    Raises:
        BenchmarkError: llama.cpp is not installed, or it cannot run this.
    """
    if find_spec("llama_cpp") is None:
        raise BenchmarkError("llama.cpp needs: pip install 'specache[bench]'")
    measure = import_module("specache.bench.llama_cpp").measure
    samples: list[float] = measure(model, context, batch, weights, cache_type, steps, torch.get_num_threads())
    return samples


def _breakdown(measured: Measured, weights_ms: float | None) -> dict[str, float] | None:
    """Split a step's milliseconds into phases.

    `rest` is the time that no phase covers: Python, small operators, the residual, masks.
    """
    if weights_ms is None:
        return None
    phases = {phase: measured.phases.get(phase, 0.0) for phase in PHASES} if measured.phases is not None else {}
    parts = {"weights": weights_ms, **phases}
    return {**parts, "rest": measured.timing.ms - sum(parts.values())}


def _compared(results: list[Result]) -> list[Result]:
    """Add `vs_dynamic` to the results: the speed-up over transformers' ordinary cache."""
    dynamic = next((result["ms_per_step"] for result in results if result["impl"] == DYNAMIC), None)
    for result in results:
        if dynamic and result["ms_per_step"]:
            result["vs_dynamic"] = dynamic / result["ms_per_step"]
    return results


def _ms(measured: Measured | Skipped) -> float | None:
    return measured.timing.ms if isinstance(measured, Measured) else None
