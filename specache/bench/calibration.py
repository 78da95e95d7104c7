"""Measure this machine's rates and a smaller model's decode steps, for `specache plan --gpu cpu`.

The smaller model has at most half of the model's own layers, with random weights. It is measured at
two depths, two contexts and two batch sizes, through the implementations that `bench decode`
compares. All times are modelled as linear in the number of layers, sequences and tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from specache.bench.base import Log
from specache.bench.contenders import BareModel, Contender, DynamicContender, SpeCacheContender
from specache.bench.plain_read import LargeArray
from specache.bench.timing import interleaved
from specache.bench.workload import Workload
from specache.config import Policy
from specache.errors import ConfigError
from specache.linear.weight_format import WeightFormat
from specache.linear.weight_quant import quantise_weights
from specache.model.dimensions import ModelDimensions
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.device_figures import GIB, Device, Efficiency
from specache.planning.roofline.measured import MeasuredSteps, MethodCost, WeightsPass
from specache.platform import machine

CONTEXTS = (2048, 8192)  # tokens
BATCHES = (1, 4)  # sequences
ROWS = (1, 2, 4, 8, 16, 32)  # per pass over the weights
STEPS, WARMUP = 7, 2
PART_BYTES = 2 << 30  # weights of the smaller model, which has at least two layers
WHOLE_BYTES = 4 << 30  # largest model with differing layers, which is measured whole
PRODUCT = 2048  # rows and columns of the matrices that are multiplied


def this_processor(repeat: int = 5) -> Device:
    """Return this machine as a device whose figures were measured here, best of `repeat`.

    Raises:
        ConfigError: the system does not report its free memory.
    """
    large = LargeArray()
    bandwidth = large.best_gb_per_s(repeat + 1)
    usable = machine.memory()["usable_bytes"]
    if usable is None:
        raise ConfigError("This system does not say how much memory is free. Describe the machine with --gpu cpu --gpu-spec FILE.")
    threads = torch.get_num_threads()
    product = f"measured here: products of {PRODUCT} x {PRODUCT} matrices, {threads} threads, best of {repeat}, in"
    return Device(
        key="cpu",
        name=machine.processor_name(),
        memory_gib=usable / GIB,
        memory_gb_per_s=bandwidth,
        matrix_tflops=_product_rate(torch.bfloat16, repeat) / 1e12,
        vector_tflops=_product_rate(torch.float32, repeat) / 1e12,
        link_gb_per_s=bandwidth,
        link="main memory",
        sources={
            "memory_gib": "this system: what is free",
            "memory_gb_per_s": f"measured here: reading {large.nbytes >> 20} MiB, {threads} threads, best of {repeat}",
            "matrix_tflops": f"{product} bfloat16",
            "vector_tflops": f"{product} float32",
            "link_gb_per_s": "rows are in main memory",
        },
        kind="cpu",
        efficiency=Efficiency(1.0, 1.0, 1.0, 1.0, 0.9),
    )


@dataclass(frozen=True)
class _Sample:
    """Seconds of one decode step, of its attention kernels, and of a pass over the weights."""

    layers: int
    context: int
    batch: int
    step: float
    kernels: float
    weights: float


@torch.no_grad()
def measured_steps(
    config: Any, dtype: torch.dtype, weights: WeightFormat, model: ModelDimensions, compared: Sequence[Method], log: Log
) -> MeasuredSteps:
    """Measure a model of fewer layers, for every method of `compared`.

    Args:
        config: transformers' configuration of the whole model.
        model: its dimensions.

    Raises:
        ConfigError: the layers differ, and the model is too large to be measured whole.
    """
    depths = _depths(model)
    log(f"Making {depths[0]} of {len(model.layers)} layers with random weights")
    part = _part(config, dtype, weights, depths[0])
    passes: dict[int, list[float]] = {}
    samples: dict[str, list[_Sample]] = {method.key: [] for method in compared}
    for depth in depths:
        _keep_layers(part, depth)
        passes[depth] = _weight_passes(part)
        for method in compared:
            log(f"{depth} layers: {method.title}")
            samples[method.key] += [_sample(part, method, depth, context, batch) for context in CONTEXTS for batch in BATCHES]
    layers = len(model.layers)
    whole = tuple(_extrapolated(depths, [passes[depth][i] for depth in depths], layers) for i in range(len(ROWS)))
    return MeasuredSteps(
        weights=WeightsPass(ROWS, whole),
        costs={key: _cost(found, layers) for key, found in samples.items()},
        layers=layers,
        measured_layers=tuple(depths),
    )


def _depths(model: ModelDimensions) -> list[int]:
    """Return the numbers of layers to measure, the largest first."""
    layers = len(model.layers)
    if len(set(model.layers)) > 1:
        if model.weight_bytes > WHOLE_BYTES:
            raise ConfigError(
                "This model's layers differ, so that a part of it says little, and it is too large to be measured whole. "
                "Describe the machine with --gpu cpu --gpu-spec FILE."
            )
        return [layers]
    most = max(2, min(layers // 2, PART_BYTES * layers // max(model.weight_bytes, 1)))
    return [most, max(1, most // 4)] if most < layers else [layers]


def _part(config: Any, dtype: torch.dtype, weights: WeightFormat, layers: int) -> Any:
    config = copy.deepcopy(config)
    _set_layers(config, layers)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    block = 0.02 * torch.randn(1 << 16, generator=generator)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 / parameter.shape[0] ** 0.5)
        else:
            repeats = -(-parameter.numel() // len(block))
            parameter.copy_(block.to(dtype).repeat(repeats)[: parameter.numel()].reshape(parameter.shape))
    quantise_weights(model, weights)
    return model


def _set_layers(config: Any, layers: int) -> None:
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:layers]


def _keep_layers(model: Any, layers: int) -> None:
    """Drop all but the first `layers` layers of a model, in place."""
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:layers]
    _set_layers(model.config, layers)


def _weight_passes(model: Any) -> list[float]:
    """Return the seconds of a forward pass without a cache for each number of `ROWS`."""
    named = {str(rows): BareModel(Workload(model, rows, CONTEXTS[0]), 1).step for rows in ROWS}
    return [timing.ms / 1e3 for timing in interleaved(named, STEPS, WARMUP).values()]


def _sample(model: Any, method: Method, layers: int, context: int, batch: int) -> _Sample:
    """Time a decode step and a forward pass without a cache, interleaved: load hits both alike."""
    work = Workload(model, batch, context)
    full = method.config.policy is Policy.FULL
    contender: Contender = DynamicContender(work) if full else SpeCacheContender(work, method.config)
    bare = BareModel(work, method.rows)
    try:
        contender.prepare()
        work.drop_rows()
        timed = {"step": contender.step, "weights": bare.step}
        found = interleaved(timed, STEPS, WARMUP, lambda name: (contender if name == "step" else bare).ready())
        phases = contender.phases(STEPS)
    finally:
        contender.close()
    step, weights = found["step"].ms / 1e3, found["weights"].ms / 1e3
    kernels = max(0.0, step - weights) if phases is None else sum(phases.values()) / 1e3
    return _Sample(layers, context, batch, step, kernels, weights)


def _cost(samples: Sequence[_Sample], layers: int) -> MethodCost:
    """Fit a method's cost to its samples, at the whole model's number of layers.

    The kernels' time is proportional to the layers. The rest of a step also has a share per model
    (logits, the next token).
    """
    kernels = _fit([(1.0, s.batch, s.batch * s.context) for s in samples], [s.kernels / s.layers for s in samples])
    rest = _fit([(1.0, s.layers, s.batch, s.layers * s.batch) for s in samples], [s.step - s.weights - s.kernels for s in samples])
    return MethodCost(
        fixed=kernels[0] * layers + rest[0] + rest[1] * layers,
        per_sequence=max(0.0, kernels[1] * layers + rest[2] + rest[3] * layers),
        per_token=max(0.0, kernels[2] * layers),
    )


def _fit(features: list[tuple[float, ...]], seconds: list[float]) -> list[float]:
    """Return the coefficients that minimise the squared relative errors.

    Relative, so that short steps count as much as long ones. Columns are scaled: where the samples
    leave the coefficients undetermined, the minimum-norm solution is then a sensible one.
    """
    matrix, values = np.array(features), np.array(seconds)
    weight = 1 / np.maximum(np.abs(values), 0.1 * np.abs(values).max() + 1e-12)
    scale = np.abs(matrix).max(axis=0)
    solution = np.linalg.lstsq(matrix / scale * weight[:, None], values * weight, rcond=None)[0]
    return [float(x) for x in solution / scale]


def _extrapolated(depths: list[int], seconds: list[float], layers: int) -> float:
    """Extrapolate `seconds` at two depths to `layers` layers.

    The result is bounded: neither a layer nor the rest of the model can take negative time.
    """
    if len(depths) == 1:
        return seconds[0]
    slope = (seconds[0] - seconds[1]) / (depths[0] - depths[1])
    reached = seconds[0] + slope * (layers - depths[0])
    return min(max(reached, seconds[0]), seconds[0] * layers / depths[0])


def _product_rate(dtype: torch.dtype, repeat: int) -> float:
    """Return the operations per second of a matrix product."""
    a = torch.randn(PRODUCT, PRODUCT).to(dtype)
    best = float("inf")
    for _ in range(repeat + 1):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * PRODUCT**3 / best
