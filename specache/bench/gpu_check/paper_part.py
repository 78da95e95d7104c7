"""Part 6: the paper's table within 48 GB, each figure beside the planner's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from specache.bench.base import BenchContext, Result
from specache.bench.compute_device import CPU, held_bytes, release_memory
from specache.bench.gpu_check.checks import Check, PartRun, on_gpu
from specache.bench.gpu_check.device_text import device_text
from specache.bench.gpu_check.memory_part import named_shape
from specache.bench.gpu_check.speed_part import LoadedSource, goal
from specache.bench.paper import Paper
from specache.bench.paper_methods import FULL, NAMES
from specache.bench.shapes import RandomModel, Weights
from specache.model.dimensions import dimensions_of
from specache.planning.roofline.capacity import Capacity
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.device_figures import GIB, Device, Efficiency
from specache.planning.roofline.step_time import Roofline

BATCH_GOAL, THROUGHPUT_GOAL = 12.0, 4.6  # of the paper, at its best setting
PLAN_GOAL = 1.25  # the planner is to be within this factor
BITS = (2, 1)


def run(part: PartRun) -> None:
    sizes = part.sizes
    weights = Weights.FP16 if on_gpu(part) else sizes.weights
    source = LoadedSource(RandomModel(named_shape(sizes.paper), weights, 0, part.device))
    results: list[Result] = []
    others = [name for name in NAMES if name != FULL]
    for bits in BITS:
        for method in (FULL, *others) if bits == BITS[0] else reversed(others):
            label = method if method == FULL else f"{method}, {bits} bits"
            part.run(
                f"paper, {label}", partial(_measure, part, source=source, results=results, method=method, bits=bits), needs_s=6
            )
    part.run("the planner beside what was measured", lambda check: _planned(part, check, source, results))


def _measure(part: PartRun, check: Check, source: LoadedSource, results: list[Result], method: str, bits: int) -> None:
    """Fill and decode the planned batch, or a smaller one that fits."""
    sizes, gpu = part.sizes, on_gpu(part)
    source.load()
    release_memory()
    limit = sizes.paper_bytes - (held_bytes(part.device) if gpu else 0)
    shape: dict[str, Any] = {} if gpu else {"top_k": 8, "chunk": 64, "max_batch": 3}
    benchmark = Paper(
        contexts=(sizes.paper_context,),
        methods=(method,),
        bits=(bits,),
        fast_memory=limit,
        steps=sizes.steps,
        rounds=2 if gpu else 1,
        search=False,
        share_rows=True,
        **shape,
    )
    [result] = benchmark.run(BenchContext(source, 0, part.device)).results
    check.require(result["fits"], f"it does not fit: {result['skipped']}")
    full = results[0] if results and results[0]["method"] == FULL else None
    if full is not None:
        result["vs_full_batch"] = result["batch"] / full["batch"]
        result["vs_full_throughput"] = result["tokens_per_s"] / full["tokens_per_s"]
    results.append(result)
    check.details = {
        key: result[key] for key in ("batch", "ms_per_step", "tokens_per_s", "vs_full_batch", "vs_full_throughput", "hit_rate")
    }
    check.details["fast_gb"] = result["fast_bytes"] / 1e9 if result["fast_bytes"] else None


def _planned(part: PartRun, check: Check, source: LoadedSource, results: list[Result]) -> None:
    """Predict each result with the rates that part 5 measured, and with those of the datasheet."""
    from specache.planning.roofline.compared_methods import methods

    check.require(results, "nothing was measured")
    device = _device(part)
    dimensions = dimensions_of(source.load())
    capacity, roofline = Capacity(device, dimensions), Roofline(device, dimensions)
    config = Paper(contexts=(part.sizes.paper_context,), fast_memory=1)._config()
    known = {method.key: method for method in methods(config)}
    rows = [_beside(one, known[_key(one)], capacity, roofline, part.sizes.paper_context) for one in results]
    part.table(
        f"the paper's table, {part.sizes.paper} at {part.sizes.paper_context:,}, within {part.sizes.paper_bytes / 1e9:.3g} GB", rows
    )
    ours = [one for one in results if one["policy"] not in (None, "none")]
    if on_gpu(part) and ours:
        best_batch = max(one["vs_full_batch"] or 0 for one in ours)
        best_rate = max(one["vs_full_throughput"] or 0 for one in ours)
        off = max(max(row["ms_over_plan"], 1 / row["ms_over_plan"]) for row in rows if row["ms_over_plan"])
        goal(part, "the paper's batch", best_batch, BATCH_GOAL, at_least=True)
        goal(part, "the paper's throughput", best_rate, THROUGHPUT_GOAL, at_least=True)
        goal(part, "measured step time over the planned one, or the reverse", off, PLAN_GOAL, at_least=False)
    part.note("Its sequences read the 16-bit rows of one, so that main memory limits no batch (bench paper --share-rows).")
    part.note("Its batch is the planned one, or a smaller one where that did not fit (bench paper --no-search).")


def _beside(result: Result, method: Method, capacity: Capacity, roofline: Roofline, context: int) -> Result:
    planned = roofline.step(method, context, result["batch"]).total * 1e3
    return {
        "method": _key(result),
        "batch": result["batch"],
        "planned batch": capacity.largest_batch(method, context),
        "ms": result["ms_per_step"],
        "planned ms": planned,
        "ms_over_plan": result["ms_per_step"] / planned,
        "tokens/s": result["tokens_per_s"],
        "x full batch": result.get("vs_full_batch"),
        "x full tokens/s": result.get("vs_full_throughput"),
        "fast GB": (result["fast_bytes"] or 0) / 1e9,
        "hit rate": result["hit_rate"],
        "limited by": result["limited_by"],
    }


def _key(result: Result) -> str:
    if result["method"] == FULL:
        return "full"
    if result["method"] == "kivi":
        return f"kivi-{result['bits']}"
    return f"{'paper' if result['policy'] == 'speculative' else 'specache'}-{result['bits']}"


def _device(part: PartRun) -> Device:
    """Return the device with the rates that part 5 measured, within the table's memory."""
    import tomllib

    facts = part.options.get("facts", {})
    if "rates" not in facts:
        part.note("Part 5 has measured no rates: the planner uses round figures.")
        facts = {
            "rates": {
                "read_gb_per_s": 3000.0,
                "copy_gb_per_s": 3000.0,
                "to_device_gb_per_s": 50.0,
                "gather_gb_per_s": 40.0,
                "matrix_tflops": 600.0,
            },
            "gpu": {"name": "a GPU", "memory_bytes": 80 * GIB, "vector_tflops": 60.0, "vector_source": "a round figure"},
        }
    values = tomllib.loads(device_text(facts))
    efficiency = Efficiency(**{**values.pop("efficiency"), "usable_memory": 1.0})
    values["memory_gib"] = part.sizes.paper_bytes / GIB
    device = Device(key="measured", efficiency=efficiency, **values)
    return device if part.device != CPU else replace(device, kind="gpu")
