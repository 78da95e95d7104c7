"""Time of one decode step from what was measured of a part of the model on this very machine (`bench.calibration`).

A processor's step is not bound by bandwidth alone: the kernels compute while they read, and Python has its share. So the slope
over the tokens, what a sequence costs besides, and the pass over the weights are measured on a few of the model's layers, and only
multiplied here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specache.errors import ConfigError
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.step_time import StepTime


@dataclass(frozen=True)
class WeightsPass:
    """Seconds of the whole model's forward pass without any cache, for some numbers of rows (ascending); lines in between."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Seconds for `rows` rows."""
        points = list(zip(self.rows, self.seconds, strict=True))
        if len(points) == 1:
            return points[0][1]
        below = max((i for i, (known, _) in enumerate(points[:-1]) if known <= rows), default=0)
        (first, low), (second, high) = points[below : below + 2]
        return max(0.0, low + (high - low) * (rows - first) / (second - first))


@dataclass(frozen=True)
class MethodCost:
    """Seconds that a method adds to a step: `fixed + B (per_sequence + S per_token)`."""

    fixed: float
    per_sequence: float
    per_token: float


@dataclass(frozen=True)
class MeasuredSteps:
    """A model on this machine.

    Attributes:
        costs: by the method's key.
        layers: of the model, and of the parts that were measured.
    """

    weights: WeightsPass
    costs: dict[str, MethodCost]
    layers: int
    measured_layers: tuple[int, ...]

    def step(self, method: Method, context: int, batch: int) -> StepTime:
        """See `StepModel`. Rows that are read in place are part of `attend`."""
        if method.key not in self.costs:
            raise ConfigError(f"{method.title} was not measured; there is {', '.join(self.costs)}.")
        cost = self.costs[method.key]
        return StepTime(
            weights=self.weights.at(batch * method.rows),
            compute=0.0,
            compute_hidden=0.0,
            scan=cost.per_token * batch * context,
            scan_bound="measured",
            attend=cost.per_sequence * batch,
            fetch=0.0,
            fetch_hidden=0.0,
            overhead=cost.fixed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Keys are stable; times are seconds."""
        return asdict(self)
