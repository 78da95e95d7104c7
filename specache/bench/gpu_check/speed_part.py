"""Part 5: the device's rates, one layer against PyTorch's attention, whole decodes against
transformers' caches, and where a step's time goes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from specache.bench import kernel_backends, shapes
from specache.bench.attention_layer import OURS, Attention
from specache.bench.base import BenchContext, Result
from specache.bench.compute_device import gpu_ms, release_memory
from specache.bench.contenders import SpeCacheContender
from specache.bench.decode_step import DYNAMIC, OFFLOADED, Decode
from specache.bench.gpu_check.check_sizes import TINY
from specache.bench.gpu_check.checks import Check, PartRun, on_gpu
from specache.bench.gpu_check.memory_part import named_shape
from specache.bench.gpu_check.rates import measure_rates
from specache.bench.shapes import RandomModel
from specache.bench.workload import Workload
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.planning.roofline.device_file import known_devices

LAYER_GOAL = (32768, 8, 3.0, 2.0)  # context, batch, times faster than the best of PyTorch, times the floor
VERIFIED_GOAL = 1.3  # times a step of policy none, which reads no rows
PROFILED = 5  # steps
TOP_KERNELS = 16
CORES_PER_MULTIPROCESSOR, CLOCK_HZ = 128, 1.7e9  # of a GPU that the planner's table does not have


def run(part: PartRun) -> None:
    part.run("rates of memory, link and matrix units", lambda check: _rates(part, check), needs_s=3)
    for context, batch in part.sizes.layer_cells:
        part.run(f"one layer, {context:,} tokens x {batch}", partial(_one_layer, part, context=context, batch=batch), needs_s=4)
    for shape, context, batch in part.sizes.models:
        part.run(
            f"decode, {shape}, {context:,} x {batch}",
            partial(_decode, part, shape=shape, context=context, batch=batch),
            needs_s=8,
        )
    shape, context, batch = part.sizes.models[0]
    part.run("where a step's time goes", lambda check: _profile(part, check, shape, context, batch), needs_s=6)


def _rates(part: PartRun, check: Check) -> None:
    rates = measure_rates(part)
    check.details = dict(rates)
    part.fact(rates=rates, gpu=_gpu_facts(part))
    part.table("rates", [{"rate": name, "value": value} for name, value in rates.items()])


def _gpu_facts(part: PartRun) -> dict[str, Any]:
    if not on_gpu(part):
        return {"name": "CPU", "memory_bytes": 2**30, "vector_tflops": 1.0, "vector_source": "none: a CPU stands for a GPU here"}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = max(
        (one for one in known_devices().values() if _names(one.key, properties.name)), key=lambda one: len(one.key), default=None
    )
    if known is not None:
        vector, source = known.vector_tflops, f"{known.source_of('vector_tflops')} (not measured)"
    else:
        vector = properties.multi_processor_count * CORES_PER_MULTIPROCESSOR * 2 * CLOCK_HZ / 1e12
        source = f"{CORES_PER_MULTIPROCESSOR} lanes per multiprocessor at {CLOCK_HZ / 1e9} GHz: not measured"
    return {"name": properties.name, "memory_bytes": properties.total_memory, "vector_tflops": vector, "vector_source": source}


def _names(key: str, name: str) -> bool:
    return key.partition("-")[0].replace("rtx", "rtx ") in name.lower()


def _one_layer(part: PartRun, check: Check, context: int, batch: int) -> None:
    _allow_tiny()
    kernels = (kernel_backends.STATIC,) if kernel_backends.STATIC in kernel_backends.layers_on(part.device) else ()
    benchmark = Attention(
        shape=part.sizes.layer, context=(context,), batch=batch, rows=(2,), repeat=part.sizes.repeat, kernels=kernels
    )
    outcome = benchmark.run(BenchContext(device=part.device))
    release_memory()
    keep = ("impl", "isa", "context", "batch", "rows", "ms", "gb_per_s", "floor_ms", "vs_floor", "vs_best_torch", "difference")
    part.table("one layer of a step (ms by CUDA events)", [{key: one.get(key) for key in keep} for one in outcome.results])
    ours = min((one for one in outcome.results if one["impl"] == OURS), key=lambda one: one["ms"])
    check.details = {"ms": ours["ms"], "vs_best_torch": ours["vs_best_torch"], "vs_floor": ours["vs_floor"]}
    goal_context, goal_batch, faster, floor = LAYER_GOAL
    if on_gpu(part) and (context, batch) == (goal_context, goal_batch):
        goal(part, "one layer against the best of PyTorch", ours["vs_best_torch"], faster, at_least=True)
        goal(part, "one layer over the bandwidth floor", ours["vs_floor"], floor, at_least=False)


@dataclass
class LoadedSource:
    """A `ModelSource` whose model is made once and used by several benchmarks."""

    source: RandomModel
    _model: Any = field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def weights(self) -> Any:
        return self.source.weights

    @property
    def shape(self) -> Any:
        return self.source.shape

    @property
    def gguf(self) -> None:
        return None

    def load(self) -> Any:
        if self._model is None:
            self._model = self.source.load()
        return self._model

    def pretrained(self) -> str:
        return self.source.pretrained()

    def prompt(self, tokens: int, text: Any, seed: int) -> list[int]:
        return self.source.prompt(tokens, text, seed)


def _decode(part: PartRun, check: Check, shape: str, context: int, batch: int) -> None:
    """Ours, KIVI on our kernels, and transformers' two caches, by the host's clock."""
    source = LoadedSource(RandomModel(named_shape(shape), part.sizes.weights, 0, part.device))
    where = BenchContext(source, 0, part.device)
    against = (DYNAMIC, OFFLOADED) if on_gpu(part) else (DYNAMIC,)
    common: dict[str, Any] = {"context": context, "batch": batch, "steps": part.sizes.steps}
    outcomes = {
        str(Policy.VERIFIED): Decode(policy=Policy.VERIFIED, against=against, **common).run(where),
        str(Policy.NONE): Decode(policy=Policy.NONE, against=(), **common).run(where),
    }
    rows: list[Result] = []
    for policy, outcome in outcomes.items():
        for one in outcome.results:
            named = f"{one['impl']} {policy}" if one["impl"] == OURS else one["impl"]
            kept = {
                key: one[key] for key in ("context", "batch", "ms_per_step", "tokens_per_s", "vs_dynamic", "vs_floor", "skipped")
            }
            rows.append({"shape": shape, "cache": named, **kept, "model_ms": outcome.details["stock_model_ms"]})
    part.table("whole decode steps (ms by the host's clock)", rows)
    release_memory()
    ours, kivi = (next(one for one in outcome.results if one["impl"] == OURS) for outcome in outcomes.values())
    check.require(ours["ms_per_step"] and kivi["ms_per_step"], f"not measured: {ours['skipped'] or kivi['skipped']}")
    check.details = {
        "ms": ours["ms_per_step"],
        "vs_dynamic": ours["vs_dynamic"],
        "vs_kivi": ours["ms_per_step"] / kivi["ms_per_step"],
    }
    if on_gpu(part):
        goal(
            part, f"a step of verified over one of none, {shape} x {batch}", check.details["vs_kivi"], VERIFIED_GOAL, at_least=False
        )


def _profile(part: PartRun, check: Check, shape: str, context: int, batch: int) -> None:
    """Time the kernels of a step by PyTorch's profiler, and the whole step by CUDA events."""
    work = Workload(RandomModel(named_shape(shape), part.sizes.weights, 0, part.device).load(), batch, context)
    contender = SpeCacheContender(work, SpeCacheConfig(policy=Policy.VERIFIED, slow_tier=SlowTierKind.RAM))
    contender.prepare()
    work.drop_rows()
    rows: list[Result] = []
    with contender.ready():
        for _ in range(3):
            contender.step()
        if on_gpu(part):
            check.details["step_ms_by_events"] = min(gpu_ms(contender.step) for _ in range(PROFILED))
        activity = torch.profiler.ProfilerActivity
        kinds = [activity.CPU, activity.CUDA] if on_gpu(part) else [activity.CPU]
        with torch.profiler.profile(activities=kinds) as profiler:
            for _ in range(PROFILED):
                contender.step()
            if on_gpu(part):
                torch.cuda.synchronize()
        name = "self_device_time_total" if on_gpu(part) else "self_cpu_time_total"
        listed = run_on(profiler, torch.autograd.DeviceType.CUDA if on_gpu(part) else torch.autograd.DeviceType.CPU)
        found = sorted(listed, key=lambda one: getattr(one, name), reverse=True)
        total = sum(getattr(one, name) for one in found) or 1.0
        for one in found[:TOP_KERNELS]:
            spent = getattr(one, name)
            rows.append(
                {"kernel": one.key[:60], "launches": one.count / PROFILED, "ms": spent / 1e3 / PROFILED, "share": spent / total}
            )
    statistics = contender.held.stats()
    contender.held.release_device_batch()
    check.details |= {"kernels_ms": total / 1e3 / PROFILED, "hit_rate": statistics["hit_rate"]}
    contender.close()
    part.table(f"a step of {shape} at {context:,} x {batch}, by kernel", rows)
    check.require(rows, "the profiler saw no kernel")


def run_on(profiler: torch.profiler.profile, device: torch.autograd.DeviceType) -> list[Any]:
    """Return what ran on a kind of device, summed by name."""
    return [one for one in profiler.key_averages() if one.device_type == device]  # a new object at every call, so not `is`


def goal(part: PartRun, what: str, found: float, goal: float, at_least: bool) -> None:
    """Add a goal of the project and whether it was reached: goals fail no check."""
    reached = found >= goal if at_least else found <= goal
    row = {
        "goal": what,
        "wanted": f"{'at least' if at_least else 'at most'} {goal}x",
        "found": found,
        "reached": "yes" if reached else "NO",
    }
    part.table("goals", [row])


def _allow_tiny() -> None:
    """Let `Attention` find the tiny shape by its name."""
    shapes.SHAPES.setdefault(TINY.name, replace(TINY))
