"""A shape that is quick to create and to run."""

from __future__ import annotations

from specache.bench.shapes import RandomModel, Shape, Weights
from specache.bench.workload import Workload

TINY = Shape("tiny", 2, 64, 96, 4, 2, 16, 97, 10_000.0, True)


def tiny_model(weights: Weights = Weights.FP32) -> RandomModel:
    return RandomModel(TINY, weights)


def tiny_workload(batch: int = 2, context: int = 200) -> Workload:
    return Workload(tiny_model().load(), batch, context)
