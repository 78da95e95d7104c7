"""Estimate the time of a decode step from measurements of a part of the model on this machine
(`bench.calibration`).

A processor's step is not bound by bandwidth alone: kernels compute while they read, and Python
takes time. So three costs are measured on a few of the model's layers and scaled here: per token,
per sequence, and of the pass over the weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specache.errors import ConfigError
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.step_time import StepTime

MOST_FASTER = 0.9  # part of a pass over the weights that faster layers can save


@dataclass(frozen=True)
class WeightsPass:
    """Seconds of the whole model's forward pass without a cache, by number of rows (ascending),
    interpolated linearly.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Return the seconds for `rows` rows."""
        points = list(zip(self.rows, self.seconds, strict=True))
        if len(points) == 1:
            return points[0][1]
        below = max((i for i, (known, _) in enumerate(points[:-1]) if known <= rows), default=0)
        (first, low), (second, high) = points[below : below + 2]
        return max(min(self.seconds), low + (high - low) * (rows - first) / (second - first))


@dataclass(frozen=True)
class MethodCost:
    """Seconds that a method adds to a step: `fixed + B (per_sequence + S per_token)`.

    `fixed` is negative where its layers are faster than the model's own (`specache.engine.traced`).
    """

    fixed: float
    per_sequence: float
    per_token: float


@dataclass(frozen=True)
class MeasuredSteps:
    """Measured step times of a model on this machine.

    Attributes:
        costs: cost by method key.
        layers: layers of the model.
        measured_layers: layers of each part that was measured.
    """

    weights: WeightsPass
    costs: dict[str, MethodCost]
    layers: int
    measured_layers: tuple[int, ...]

    def step(self, method: Method, context: int, batch: int) -> StepTime:
        """See `StepModel`. Reads of pairs in place are part of `attend`."""
        if method.key not in self.costs:
            raise ConfigError(f"{method.title} was not measured; there is {', '.join(self.costs)}.")
        cost = self.costs[method.key]
        faster = max(min(0.0, cost.fixed), -MOST_FASTER * min(self.weights.seconds))
        return StepTime(
            weights=self.weights.at(batch * method.rows) + faster,
            compute=0.0,
            compute_hidden=0.0,
            scan=cost.per_token * batch * context,
            scan_bound="measured",
            attend=cost.per_sequence * batch,
            fetch=0.0,
            fetch_hidden=0.0,
            overhead=max(0.0, cost.fixed),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. Keys are stable; times are seconds."""
        return asdict(self)
