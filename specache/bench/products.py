"""`products`: a model's matrices times a few rows, in every weight format, against a plain read.

A decode step multiplies every matrix of the model by one row (or two, with a draft token; more in a
batch), so that reading the weights is all there is to wait for. The modules are those that a model
gets (`linear/`), whatever kernels are inside.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specache.bench.base import BenchContext, Outcome, Result, check_at_least
from specache.bench.compute_device import CPU
from specache.bench.environment import gigabytes
from specache.bench.plain_read import LargeArray
from specache.bench.published_shapes import shape_of
from specache.bench.shapes import Shape, Weights
from specache.bench.timing import Timing, interleaved
from specache.errors import ConfigError
from specache.linear import cpu_linear
from specache.linear.weight_quant import Int4Linear, Int8Linear, PackedLinear
from specache.platform.machine import available_memory
from specache.platform.mapped_memory import Arena

FORMATS = (Weights.FP32, Weights.BF16, Weights.INT8, Weights.INT4)
SHAPES = ("smollm2-135m", "llama-3.2-1b", "llama-3-8b")
PASS_BYTES = 32 << 20  # small matrices are multiplied in several copies, so that a sample takes milliseconds
MOST_COPIES = 64
MOST_HEAD_ROWS = 8  # a prompt needs the logits of its last token only
WORKING_BYTES = 12  # per element, while a matrix is made and quantised
_STANDARD_DEVIATION = 0.02


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [N, K] of a model, and which layers have one of this size."""

    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True, kw_only=True)
class Products:
    """Products of a few rows with cold weights."""

    name: ClassVar[str] = "products"
    summary: ClassVar[str] = "products of few rows with a model's matrices per weight format, against a plain read and PyTorch"
    uses_model: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = (
        *("shape", "matrix", "format", "rows", "ms", "spread", "gb_per_s"),
        *("vs_read", "vs_torch"),
    )
    shape: tuple[str, ...] = field(default=SHAPES, metadata={"help": "Models whose matrices are multiplied."})
    formats: tuple[str, ...] = field(
        default=tuple(map(str, FORMATS)), metadata={"help": f"Number formats of the weights: {', '.join(FORMATS)}."}
    )
    rows: tuple[int, ...] = field(
        default=(1, 2, 4, 8), metadata={"help": "Rows of activations: few in a decode step, 64 or 512 for a prompt."}
    )
    repeat: int = field(default=9, metadata={"help": "Rounds; ours and PyTorch's product run once in each."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "rows", "repeat")
        for name in self.shape:
            shape_of(name)
        unknown = set(self.formats) - set(map(str, FORMATS))
        if unknown or not self.formats or not self.shape:
            raise ConfigError(f"--formats takes {', '.join(FORMATS)}, got {', '.join(sorted(unknown)) or 'nothing'}.")

    @torch.no_grad()
    def run(self, bench: BenchContext) -> Outcome:
        """Run the benchmark. See `Benchmark.run`."""
        if bench.device != CPU:
            raise ConfigError("The products of specache are for the CPU. Use --device cpu.")
        large = LargeArray()
        results: list[Result] = []
        for name in self.shape:
            for matrix in matrices(shape_of(name)):
                bench.log(f"{name}: {matrix.name}, {matrix.outputs:,} x {matrix.inputs:,}")
                for weights in map(Weights, self.formats):
                    results += [{"shape": name, **result} for result in self._measure(matrix, weights, large, bench.seed)]
        bandwidth = large.best_gb_per_s()  # of all reads of the run
        for result in results:
            if result["gb_per_s"] is not None:
                result["vs_read"] = result["gb_per_s"] / bandwidth
        return Outcome(results, {"plain_read": large.describe()})

    def _measure(self, matrix: Matrix, weights: Weights, large: LargeArray, seed: int) -> Iterator[Result]:
        rows = [rows for rows in self.rows if matrix.name != "head" or rows <= MOST_HEAD_ROWS]
        needed, free = matrix.outputs * matrix.inputs * WORKING_BYTES, available_memory()
        if free is not None and needed > free:
            reason = f"needs {gigabytes(needed)} of memory, {gigabytes(free)} are free"
            yield from ({**_empty(matrix, weights, count), "skipped": reason} for count in rows)
            return
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(matrix.outputs, matrix.inputs, generator=generator).mul_(_STANDARD_DEVIATION).to(weights.dtype)
        ours, stock = _copies(_module(weight, weights)), _copies(_linear(weight))
        del weight
        for count in rows:
            x = torch.randn(count, matrix.inputs, generator=generator).to(weights.dtype)
            yield self._result(matrix, weights, x, ours, stock, large)
        del ours, stock
        gc.collect()

    def _result(
        self, matrix: Matrix, weights: Weights, x: Tensor, ours: list[nn.Module], stock: list[nn.Module], large: LargeArray
    ) -> Result:
        @contextmanager
        def evicted(name: str) -> Iterator[None]:
            large.read()
            yield

        installed = [layer for module in ours for layer in cpu_linear.install(module)]
        try:
            timings = interleaved({"ours": _pass(ours, x), "torch": _pass(stock, x)}, self.repeat, around=evicted)
            difference = _difference(ours[0](x), stock[0](x))
        finally:
            cpu_linear.remove(installed)
        timing = Timing(tuple(ms / len(ours) for ms in timings["ours"].samples_ms))
        nbytes = module_bytes(ours[0])
        return {
            **_empty(matrix, weights, len(x)),
            "ms": timing.ms,
            "spread": timing.spread,
            "bytes": nbytes,
            "gb_per_s": nbytes / timing.ms / 1e6,
            "vs_torch": timings["torch"].ms / len(stock) / timing.ms,
            "difference": difference,
        }


def matrices(shape: Shape) -> list[Matrix]:
    """Return the matrices of a model of this shape. Those of one size are one."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    named = (
        ("q", (queries, hidden)),
        ("k", (keys, hidden)),
        ("v", (keys, hidden)),
        ("o", (hidden, queries)),
        ("gate", (inner, hidden)),
        ("up", (inner, hidden)),
        ("down", (hidden, inner)),
        ("head", (shape.vocabulary, hidden)),
    )
    sizes: dict[tuple[int, int], list[str]] = {}
    for name, size in named:
        sizes.setdefault(size, []).append(name)
    return [Matrix(" ".join(names), *size) for size, names in sizes.items()]


def module_bytes(module: nn.Module) -> int:
    """Return the bytes that a product with this module must read."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _module(weight: Tensor, weights: Weights) -> nn.Module:
    """Return the module that a model with these weights has."""
    made: dict[Weights, Callable[[Tensor, None], nn.Module]] = {Weights.INT8: Int8Linear, Weights.INT4: Int4Linear}
    return made[weights](weight, None) if weights in made else _linear(weight)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _copies(module: nn.Module) -> list[nn.Module]:
    """Return as many modules as make a sample of `PASS_BYTES`, each in memory of its own.

    Packed ones lie behind one another, as the matrices of a model do.
    """
    count = min(max(PASS_BYTES // module_bytes(module), 1), MOST_COPIES)
    copies, arena = [module, *(copy.deepcopy(module) for _ in range(count - 1))], Arena()
    for packed in (each for each in copies if isinstance(each, PackedLinear)):
        for name, buffer in packed.named_buffers():
            setattr(packed, name, arena.empty(buffer.shape, buffer.dtype).copy_(buffer))
    return copies


def _pass(modules: list[nn.Module], x: Tensor) -> Callable[[], None]:
    def multiply() -> None:
        for module in modules:
            module(x)

    return multiply


def _difference(ours: Tensor, stock: Tensor) -> float:
    """Return the size of the difference relative to that of PyTorch's result."""
    return float((ours.float() - stock.float()).norm() / stock.float().norm())


def _empty(matrix: Matrix, weights: Weights, rows: int) -> dict[str, Any]:
    return {
        "matrix": matrix.name,
        "outputs": matrix.outputs,
        "inputs": matrix.inputs,
        "format": str(weights),
        "rows": rows,
        "ms": None,
        "spread": None,
        "bytes": None,
        "gb_per_s": None,
        "vs_read": None,
        "vs_torch": None,
        "difference": None,
        "skipped": None,
    }
