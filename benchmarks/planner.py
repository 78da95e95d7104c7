"""Compare the planner's milliseconds per step with those of `specache bench decode` here.

    python benchmarks/planner.py [--shape llama-3.2-1b] [--contexts 4096,16384,32768]
                                 [--batches 1,4] [--bits 2] [--weights bf16] [--steps 10]
                                 [--threads N] [--ours] [--json FILE]

Predicted: what `specache plan --gpu cpu` reports, from half of the model's layers or fewer at 2,048
and 8,192 tokens. Measured: whole models through the benchmark. The ratio is predicted over
measured. `--ours` leaves out transformers' ordinary cache, which takes most of the time. Ends with
exit code 1 where a ratio of ours is not within 25%.

The pass over the weights does not depend on the context. Where its prediction is off, the machine
was busy in one of the two measurements. The last column gives the ratio with the pass as it was
measured together with the step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from specache.bench.base import BenchContext
from specache.bench.calibration import measured_steps
from specache.bench.decode_step import DYNAMIC, Decode
from specache.bench.environment import describe
from specache.bench.shapes import RandomModel, Weights, shape_named
from specache.config import SpeCacheConfig
from specache.model.dimensions import dimensions_of, without_weights
from specache.planning.roofline.compared_methods import Method, methods
from specache.planning.roofline.measured import MeasuredSteps

LIMIT = 1.25  # largest factor between prediction and measurement
OURS = "specache"


def predicted(model: RandomModel, compared: list[Method], log: Any) -> MeasuredSteps:
    """Return the planner's measurements."""
    config = model.shape.config()
    dimensions = dimensions_of(without_weights(config, model.weights.dtype), device="cpu", weights=model.weights.quantised)
    return measured_steps(config, model.weights.dtype, model.weights.quantised, dimensions, compared, log)


def rows(steps: MeasuredSteps, compared: dict[str, Method], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per implementation that was measured."""
    lines = []
    for result in results:
        if result["ms_per_step"] is None:
            continue
        step = steps.step(compared[result["impl"]], result["context"], result["batch"])
        predicted_ms = step.total * 1e3
        weights_ms = (result["breakdown"] or {}).get("weights")
        corrected_ms = None if weights_ms is None else predicted_ms - step.weights * 1e3 + weights_ms
        known = {key: result[key] for key in ("impl", "context", "batch", "spread", "breakdown")}
        lines.append(
            {
                **known,
                "predicted_ms": predicted_ms,
                "measured_ms": result["ms_per_step"],
                "ratio": predicted_ms / result["ms_per_step"],
                "ratio_with_measured_weights": None if corrected_ms is None else corrected_ms / result["ms_per_step"],
                "predicted": step.to_dict(),
            }
        )
    return lines


def table(lines: list[dict[str, Any]]) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for column in (
        "impl",
        "context",
        "batch",
        "predicted, ms",
        "measured, ms",
        "quartiles",
        "ratio",
        "weights: predicted",
        "measured",
    ):
        shown.add_column(column, justify="left" if column == "impl" else "right")
    for line in lines:
        low, high = line["spread"]
        weights, corrected = (line["breakdown"] or {}).get("weights"), line["ratio_with_measured_weights"]
        shown.add_row(
            *(
                line["impl"],
                f"{line['context']:,}",
                str(line["batch"]),
                f"{line['predicted_ms']:.1f}",
                f"{line['measured_ms']:.1f}",
            ),
            *(f"{low:.1f} to {high:.1f}", f"{line['ratio']:.2f}", f"{line['predicted']['weights_ms']:.1f}"),
            *("-" if value is None else f"{value:{form}}" for value, form in ((weights, ".1f"), (corrected, ".2f"))),
        )
    return shown


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--contexts", type=numbers, default=[4096, 16384, 32768])
    parser.add_argument("--batches", type=numbers, default=[1, 4])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--weights", type=Weights, default=Weights.BF16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ours", action="store_true", help="leave out transformers' ordinary cache")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)

    where, model = describe(), RandomModel(shape_named(chosen.shape), chosen.weights)
    every = {method.key: method for method in methods(SpeCacheConfig(bits=chosen.bits).resolved("cpu"))}
    compared = {OURS: every[f"{OURS}-{chosen.bits}"]}
    if not chosen.ours:
        compared[DYNAMIC] = every["full"]
    console = Console(stderr=True, highlight=False)
    steps = predicted(model, list(compared.values()), console.print)
    lines: list[dict[str, Any]] = []
    for context in chosen.contexts:
        for batch in chosen.batches:
            benchmark = Decode(
                bits=chosen.bits, context=context, batch=batch, steps=chosen.steps, against=() if chosen.ours else (DYNAMIC,)
            )
            found = rows(steps, compared, benchmark.run(BenchContext(model)).results)
            for line in found:
                console.print("{impl}, {batch} x {context:,}: {predicted_ms:.1f} / {measured_ms:.1f} ms".format(**line))
            lines += found
    Console(highlight=False, width=160).print(table(lines))
    if chosen.json:
        document = {"shape": chosen.shape, "weights": chosen.weights, "calibration": steps.to_dict(), "lines": lines, **where}
        chosen.json.write_text(json.dumps(document, indent=2))
    off = [line for line in lines if line["impl"] == OURS and not 1 / LIMIT <= line["ratio"] <= LIMIT]
    return 1 if off or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
