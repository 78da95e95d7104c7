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
from specache.bench.busy import busy_processes
from specache.bench.cache_options import CacheOptions
from specache.bench.compare import Measured, Skipped, compare
from specache.bench.compute_device import CPU
from specache.bench.contenders import BareModel, Contender, DynamicContender, QuantizedContender, SpeCacheContender
from specache.bench.offloaded import OffloadedContender
from specache.bench.plain_read import LargeArray
from specache.bench.shapes import Weights
from specache.bench.timing import Timing
from specache.bench.workload import Workload
from specache.engine.compiled import compile_decode
from specache.errors import BenchmarkError, ConfigError

DYNAMIC, DYNAMIC_OURS, QUANTIZED, LLAMA_CPP = "dynamic", "dynamic-ours", "quantized", "llama.cpp"
OFFLOADED = "offloaded"
AGAINST = (DYNAMIC, DYNAMIC_OURS, QUANTIZED, OFFLOADED, LLAMA_CPP)
LLAMA_CPP_CACHES = ("f16", "q8_0", "q4_0")
LLAMA_CPP_WEIGHTS = {Weights.INT8: ("q8_0",), Weights.INT4: ("q4_0", "q4_1")}  # its formats of as many bits as ours
PHASE_STEPS = 5
FLOOR_READS = 3  # at least; every step is preceded by one more


@dataclass(frozen=True, kw_only=True)
class Decode(CacheOptions):
    """Decode steps of a whole model with SpeCache and with other caches of the same weights."""

    name: ClassVar[str] = "decode"
    summary: ClassVar[str] = "tokens per second of a whole model, against transformers' caches and llama.cpp"
    uses_model: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        *("impl", "weights", "cache", "batch", "context", "ms_per_step", "spread", "tokens_per_s"),
        *("vs_dynamic", "vs_dynamic_ours", "vs_floor", "breakdown"),
    )
    context: int = field(default=32768, metadata={"help": "Synthetic tokens per sequence."})
    batch: int = field(default=1, metadata={"help": "Sequences decoded together."})
    against: tuple[str, ...] = field(default=(DYNAMIC,), metadata={"help": f"What to compare with: {', '.join(AGAINST)}."})
    steps: int = field(default=10, metadata={"help": "Timed steps of each; they are interleaved."})
    compile: bool = field(default=False, metadata={"help": "Compile our decode step first (half a minute the first time)."})
    warm: bool = field(
        default=False,
        metadata={"help": "Leave the caches as they are, instead of reading a large array before every step, which empties them."},
    )
    busy: int = field(default=0, metadata={"help": "Busy processes beside all steps, as other programs would be."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "context", "batch", "steps")
        check_at_least(self, 0, "busy")
        self.config()
        unknown = set(self.against) - set(AGAINST)
        if unknown:
            raise ConfigError(f"--against takes {', '.join(AGAINST)}, got {', '.join(sorted(unknown))}.")

    def run(self, bench: BenchContext) -> Outcome:
        source = bench.model_source
        bench.log(f"Loading {source.name}")
        work = Workload(source.load(), self.batch, self.context, bench.seed)
        large = LargeArray(device=work.info.device.type)
        if self.compile:
            compile_decode(work.model)
        ours = SpeCacheContender(work, self.config())
        contenders: list[Contender] = [ours]
        skipped = {}
        for name in (name for name in self.against if name != LLAMA_CPP):
            try:
                contenders.append(self._stock(name, work))
            except ConfigError as error:
                skipped[name] = str(error)
        bare = {rows: BareModel(work, rows, ours=True) for rows in ((1, 2) if ours.config.policy.drafts else (1,))}
        products, stock = BareModel(work, 1, products=True), BareModel(work, 1)
        evict = _nothing if self.warm else large.read
        with busy_processes(self.busy):
            measured = compare(work, [*contenders, *bare.values(), products, stock], self.steps, bench.log, PHASE_STEPS, evict)
        large.best_gb_per_s(FLOOR_READS)
        results = []
        for contender in contenders:
            weights = _ms(measured[self._weights_of(contender, bare, products, stock)])
            results.append(self._result(contender, measured[contender], weights, source.weights, large))
        results += [self._empty(name, "", source.weights, reason) for name, reason in skipped.items()]
        details = {
            "model_ms": {str(rows): _ms(measured[one]) for rows, one in bare.items()},
            "stock_model_ms": _ms(measured[stock]),
            "plain_read": large.describe(),
        }
        evicting = 0 if self.warm else large.nbytes
        del work, contenders, ours, bare, products, stock, measured, large  # llama.cpp loads the model again
        if LLAMA_CPP in self.against:
            with busy_processes(self.busy):
                results += self._llama_cpp(bench, evicting)
        return Outcome(_compared(results), details)

    def _stock(self, name: str, work: Workload) -> Contender:
        if name == QUANTIZED:
            return QuantizedContender(work, self.bits)
        if name == OFFLOADED:
            return OffloadedContender(work)
        return DynamicContender(work, ours=name == DYNAMIC_OURS)

    def _weights_of(self, contender: Contender, bare: dict[int, BareModel], products: BareModel, stock: BareModel) -> BareModel:
        """Return the model without a cache with as many rows and the same layers as in a step."""
        if isinstance(contender, SpeCacheContender):
            return bare[2 if contender.config.policy.drafts else 1]
        return products if contender.impl == DYNAMIC_OURS else stock

    def _result(
        self, contender: Contender, measured: Measured | Skipped, weights_ms: float | None, weights: str, large: LargeArray
    ) -> Result:
        if isinstance(measured, Skipped):
            return self._empty(contender.impl, contender.cache, weights, measured.reason)
        result = self._timed(contender.impl, contender.cache, weights, measured.timing, measured.interleaved)
        result["breakdown"] = _breakdown(measured, weights_ms)
        if contender.read_bytes is not None:
            floor = large.floor_ms(contender.read_bytes)
            result |= {"bytes": contender.read_bytes, "floor_ms": floor, "vs_floor": measured.timing.ms / floor}
        return result

    def _llama_cpp(self, bench: BenchContext, evicting_bytes: int) -> Iterator[Result]:
        source = bench.model_source
        if source.shape is None:
            formats: tuple[str, ...] = ("file",)  # a .gguf file has weights of its own
        else:
            formats = LLAMA_CPP_WEIGHTS.get(source.weights, (str(source.weights),))
        model = source.shape or source.gguf or source.name
        for weights in formats:
            for cache in LLAMA_CPP_CACHES:
                if bench.device != CPU:
                    yield self._empty(LLAMA_CPP, cache, weights, "it is measured on the CPU only. Use --device cpu")
                    continue
                bench.log(f"llama.cpp with {weights} weights and {cache} cache")
                try:
                    samples = llama_cpp_steps(model, self.context, self.batch, weights, cache, self.steps, evicting_bytes)
                except BenchmarkError as error:
                    yield self._empty(LLAMA_CPP, cache, weights, str(error))
                else:
                    yield self._timed(LLAMA_CPP, cache, weights, Timing(tuple(samples)), False)

    def _timed(self, impl: str, cache: str, format: str, timing: Timing, interleaved: bool) -> Result:
        return {
            **self._empty(impl, cache, format, None),
            "ms_per_step": timing.ms,
            "spread": timing.spread,
            "tokens_per_s": self.batch * 1e3 / timing.ms,
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
            "vs_dynamic_ours": None,
            "bytes": None,
            "floor_ms": None,
            "vs_floor": None,
            "breakdown": None,
            "interleaved": None,
            "skipped": reason,
        }


def llama_cpp_steps(
    model: Any, context: int, batch: int, weights: str, cache_type: str, steps: int, evicting_bytes: int = 0
) -> list[float]:
    """Return the milliseconds of `steps` decode steps of llama.cpp.

    Args:
        model: a `Shape`, or the model's name as the user wrote it.
        evicting_bytes: size of an array that is read before every step, outside of its time.

    Raises:
        BenchmarkError: llama.cpp is not installed, or it cannot run this.
    """
    if find_spec("llama_cpp") is None:
        raise BenchmarkError("llama.cpp needs: pip install 'specache[bench]'")
    measure = import_module("specache.bench.llama_cpp").measure
    samples: list[float] = measure(model, context, batch, weights, cache_type, steps, torch.get_num_threads(), evicting_bytes)
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
    """Add the speed-ups over transformers' cache, with PyTorch's products and with ours."""
    for impl, key in ((DYNAMIC, "vs_dynamic"), (DYNAMIC_OURS, "vs_dynamic_ours")):
        dynamic = next((result["ms_per_step"] for result in results if result["impl"] == impl), None)
        for result in results:
            if dynamic and result["ms_per_step"]:
                result[key] = dynamic / result["ms_per_step"]
    return results


def _ms(measured: Measured | Skipped) -> float | None:
    return measured.timing.ms if isinstance(measured, Measured) else None


def _nothing() -> None:
    """Leave the caches as they are."""
