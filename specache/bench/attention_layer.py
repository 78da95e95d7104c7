"""`attention`: one layer of one decode step, on every kernel backend and in plain PyTorch.

Times are also compared with the time to read the same bytes from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from specache.bench import kernel_backends
from specache.bench.base import BenchContext, Outcome, Result, check_at_least
from specache.bench.breakdown import recorded
from specache.bench.compute_device import CPU, CUDA, gpu_ms, host_ms
from specache.bench.one_layer import LowBitLayer
from specache.bench.plain_read import LargeArray
from specache.bench.shapes import SHAPES, Shape, shape_named
from specache.bench.static_layer import StaticLayer
from specache.bench.synthetic import synthetic_rows
from specache.bench.timing import PhaseClock, Timing, interleaved
from specache.bench.torch_attention import Baseline, dequantising_baseline, exact_baselines, gpu_baselines
from specache.config import PAGE_TOKENS, SUPPORTED_BITS, Code
from specache.errors import ConfigError

OURS = "specache"
_SDPA = "sdpa bf16"
_MATMUL = "matmul"


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Score, select, fetch from RAM and attend in one layer, against attention over everything."""

    name: ClassVar[str] = "attention"
    summary: ClassVar[str] = "one layer of a decode step per instruction set, against sdpa, matrix products and dequantising"
    uses_model: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = (
        *("impl", "isa", "bits", "top_k", "rows", "batch", "context", "ms", "spread", "gb_per_s"),
        *("vs_sdpa_bf16", "vs_best_torch", "vs_best_matmul", "vs_floor", "phases"),
    )
    shape: str = field(default="llama-3-8b", metadata={"help": f"Dimensions of the layer: {', '.join(SHAPES)}."})
    context: tuple[int, ...] = field(default=(32768,), metadata={"help": "Tokens in the layer, multiples of 64."})
    batch: int = field(default=1, metadata={"help": "Sequences of a step, each with keys and values of its own."})
    bits: tuple[int, ...] = field(default=(2,), metadata={"help": "Bits per number of the low-bit copy."})
    rows: tuple[int, ...] = field(default=(1,), metadata={"help": "Rows of a step: 1 (on-demand), 2 (with a draft token)."})
    code: Code = field(default=Code.ROTATED, metadata={"help": "How numbers become bits."})
    top_k: int | None = field(
        default=None, metadata={"help": "16-bit pairs swapped in per key-value head and row. Default: that of bits and context."}
    )
    repeat: int = field(default=15, metadata={"help": "Rounds; every implementation runs once in each."})
    kernels: tuple[str, ...] = field(default=(), metadata={"help": "Kernel backends to measure. Default: all that run here."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "context", "rows", "repeat", "batch", *([] if self.top_k is None else ["top_k"]))
        check_at_least(self, 1, "bits")
        shape_named(self.shape)
        if any(bits not in SUPPORTED_BITS for bits in self.bits):
            raise ConfigError(f"--bits takes {', '.join(map(str, SUPPORTED_BITS))}, got {', '.join(map(str, self.bits))}.")
        if any(rows > 2 for rows in self.rows):
            raise ConfigError(f"--rows takes 1 and 2, got {', '.join(map(str, self.rows))}.")
        if any(context % PAGE_TOKENS for context in self.context):
            raise ConfigError(
                f"--context takes multiples of {PAGE_TOKENS} tokens: whole pages of the low-bit copy, and the residual."
            )
        self._check_kernels([*kernel_backends.available(), kernel_backends.STATIC])

    @torch.no_grad()
    def run(self, bench: BenchContext) -> Outcome:
        self._check_kernels(kernel_backends.layers_on(bench.device))
        large = LargeArray(device=bench.device)
        results: list[Result] = []
        bandwidths = []
        for context in self.context:
            for rows in self.rows:
                bench.log(f"{self.shape}: {self.batch} x {context:,} tokens, {rows} row{'s' if rows > 1 else ''}")
                cell = _Cell(self, context, rows, bench, large)
                results += cell.measure()
                bandwidths.append({"context": context, "rows": rows, **cell.bandwidth})
        return Outcome(results, {"bandwidth": bandwidths, "plain_read": large.describe()})

    def _check_kernels(self, known: list[str]) -> None:
        unknown = set(self.kernels) - set(known)
        if unknown:
            raise ConfigError(f"no kernels {', '.join(sorted(unknown))} here. There are: {', '.join(known)}.")


class _Cell:
    """One context length and number of rows. All implementations are timed in the same rounds."""

    def __init__(self, benchmark: Attention, context: int, rows: int, where: BenchContext, large: LargeArray) -> None:
        self._benchmark = benchmark
        self._context, self._rows = context, rows
        self._large = large
        self._reads_ms: list[float] = []
        shape = shape_named(benchmark.shape)
        keys, values = synthetic_rows(shape.kv_heads, context, shape.head_dim, torch.bfloat16, where.seed, where.device)
        self._query = _query(shape, benchmark.batch, rows, where.seed).to(where.device)
        self._layers = {bits: self._layer(keys, values, bits) for bits in benchmark.bits}
        self._ours = [(isa, bits) for isa in benchmark.kernels or kernel_backends.layers_on(where.device) for bits in self._layers]
        static = {bits for isa, bits in self._ours if isa == kernel_backends.STATIC}
        self._static = {bits: StaticLayer(self._layer(keys, values, bits), rows, keys.dtype) for bits in static}
        self._on_gpu = where.device == CUDA
        self._baselines = (gpu_baselines if self._on_gpu else exact_baselines)(self._query, keys, values)
        if not self._on_gpu:
            self._baselines += [dequantising_baseline(self._query, keys, values, bits) for bits in self._layers]
        self.bandwidth: dict[str, Any] = {}

    def measure(self) -> list[Result]:
        differences = {key: self._difference(*key) for key in self._ours}
        functions: dict[str, Callable[[], object]] = {_label(*key): self._step(*key) for key in self._ours}
        functions |= {_baseline_label(baseline): baseline.run for baseline in self._baselines}
        timer = (lambda function: gpu_ms(function, self._large.queue)) if self._on_gpu else host_ms
        timings = interleaved(functions, self._benchmark.repeat, 2 if self._on_gpu else 1, self._around, timer)
        self.bandwidth = self._bandwidth(Timing(tuple(self._reads_ms)))
        return self._results(timings, differences)

    def _layer(self, keys: Tensor, values: Tensor, bits: int) -> LowBitLayer:
        return LowBitLayer(keys, values, self._benchmark.code, bits, self._benchmark.top_k, batch=self._benchmark.batch)

    def _step(self, isa: str, bits: int) -> Callable[[], Tensor]:
        layer = self._static[bits] if isa == kernel_backends.STATIC else self._layers[bits]
        return lambda: layer.attend(self._query)

    def _around(self, name: str) -> AbstractContextManager[object]:
        isa = next((isa for isa, bits in self._ours if _label(isa, bits) == name), None)
        return self._evicted(isa)

    @contextmanager
    def _evicted(self, isa: str | None) -> Iterator[None]:
        """Evict this layer from the caches, as other layers do between two steps.

        It reads a large array, which also measures the bandwidth.
        """
        self._reads_ms.append(self._large.read())
        if isa in (None, kernel_backends.STATIC):
            yield
            return
        assert isa is not None
        with kernel_backends.using(isa):
            yield

    def _difference(self, isa: str, bits: int) -> float:
        """Return the largest difference from the plain PyTorch kernels, over the largest output.

        For the static step only the real row is compared: its draft row attends without the pairs
        that have not been fetched.
        """
        with kernel_backends.using(kernel_backends.PLAIN):
            expected = self._layers[bits].attend(self._query)
        with nullcontext() if isa == kernel_backends.STATIC else kernel_backends.using(isa):
            actual = self._step(isa, bits)()
        if isa == kernel_backends.STATIC:
            actual, expected = actual[:, :, :1], expected[:, :, :1]
        return float((actual - expected).abs().max() / expected.abs().max())

    def _phases(self, isa: str, bits: int) -> dict[str, float]:
        """Return the milliseconds of score, select, fetch and attend in further steps.

        The clock slows these steps a little.
        """
        clock = PhaseClock()
        with recorded(clock):
            for _ in range(self._benchmark.repeat):
                with self._evicted(isa):
                    clock.begin_step()
                    self._layers[bits].attend(self._query)
        return clock.medians(self._benchmark.repeat)

    def _bandwidth(self, read: Timing) -> dict[str, Any]:
        """Return the best and the median bandwidth. The floor uses the best one, which does not
        depend on the machine's load.
        """
        return {
            "read_gb_per_s": _gb_per_s(self._large.nbytes, read.best_ms),
            "median_gb_per_s": _gb_per_s(self._large.nbytes, read.ms),
        }

    def _results(self, timings: dict[str, Timing], differences: dict[tuple[str, int], float]) -> list[Result]:
        exact = {b.impl: timings[_baseline_label(b)] for b in self._baselines if b.bits >= 16}
        best = min(exact, key=lambda impl: exact[impl].ms)
        best_matmul = min((impl for impl in exact if impl.startswith(_MATMUL)), key=lambda impl: exact[impl].ms, default=None)
        self.bandwidth |= {"best_torch": best, "best_matmul": best_matmul}
        results = []
        for isa, bits in self._ours:
            timing = timings[_label(isa, bits)]
            row = self._row(OURS, isa, bits, self._layers[bits].nbytes, timing, exact, best, best_matmul)
            phases = None if isa == kernel_backends.STATIC else self._phases(isa, bits)  # a graph has no phases to time
            config = self._layers[bits].config
            pairs = config.selection.most(config.low_bit_length(self._context))
            results.append({**row, "top_k": pairs, "difference": differences[isa, bits], "phases": phases})
        isa = torch.backends.cpu.get_cpu_capability().lower() if self._query.device.type == CPU else CUDA
        for b in self._baselines:
            row = self._row(b.impl, isa, b.bits, b.nbytes, timings[_baseline_label(b)], exact, best, best_matmul)
            results.append({**row, "top_k": None, "difference": None, "phases": None})
        return results

    def _row(
        self,
        impl: str,
        isa: str,
        bits: int,
        nbytes: int,
        timing: Timing,
        exact: dict[str, Timing],
        best: str,
        best_matmul: str | None,
    ) -> Result:
        floor = nbytes / (self.bandwidth["read_gb_per_s"] * 1e6)  # ms
        return {
            "impl": impl,
            "isa": isa,
            "bits": bits,
            "rows": self._rows,
            "batch": self._benchmark.batch,
            "context": self._context,
            "ms": timing.ms,
            "spread": timing.spread,
            "bytes": nbytes,
            "gb_per_s": _gb_per_s(nbytes, timing.ms),
            "vs_sdpa_bf16": exact[_SDPA].ms / timing.ms,
            "vs_best_torch": exact[best].ms / timing.ms,
            "vs_best_matmul": None if best_matmul is None else exact[best_matmul].ms / timing.ms,
            "vs_floor": timing.ms / floor,
            "floor_ms": floor,
        }


def _query(shape: Shape, batch: int, rows: int, seed: int) -> Tensor:
    """Return seeded queries, bfloat16 [B, Hq, n, D]."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch, shape.query_heads, rows, shape.head_dim, generator=generator).to(torch.bfloat16)


def _label(isa: str, bits: int) -> str:
    return f"{OURS} {isa} {bits}"


def _baseline_label(baseline: Baseline) -> str:
    return f"{baseline.impl} {baseline.bits}"


def _gb_per_s(nbytes: int, ms: float) -> float:
    return nbytes / ms / 1e6
