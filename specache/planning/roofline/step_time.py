"""Compute the time of one decode step from bytes, operations and a device's rates (the roofline
model).

- Linear layers: the longer of reading the weights and the arithmetic.
- Low-bit copy: the longest of reading it, multiplying on the matrix units, and unpacking on the
  vector units.
- Fast memory: scores, residual, windows and fetched 16-bit pairs are read from it.
- Slow tier: pairs come over the link. Those that the draft token selected come while the rest of
  the step runs; the step waits for those that only the real token selected.

Symbols: `B` sequences, `S` tokens, `n` query rows per sequence, `G` query heads per KV head.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from specache.config import Policy, SlowTierKind
from specache.errors import ConfigError
from specache.model.dimensions import ModelDimensions
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.device_figures import Device
from specache.planning.roofline.kernel_costs import TILE_ROWS, UNPACK_INSTRUCTIONS
from specache.planning.traffic import StepTraffic, step_traffic

# Share of the pairs fetched by `verified` that the real token's row waits for; the draft token's
# row asked for the rest. From docs/results.md, `hot_set` of 0.0 and 0.08: 43%, 24% and 13%, 9% of k
# were not there when they were needed, and 0.47 and 0.18 of k are read
# (`traffic.MISSES_OF_ONE_STEP`).
WAITED_FOR = 0.6
DISK_UNIT = 4096  # bytes; a disk is read in whole units


@dataclass(frozen=True)
class StepTime:
    """Seconds of one decode step of a batch. Parts run one after the other, except what is hidden.

    Attributes:
        weights: reading the weights.
        compute: arithmetic of the linear layers.
        compute_hidden: the part of `compute` that runs while the weights are read.
        scan: attention over the low-bit copy, or over the 16-bit cache.
        scan_bound: what limits the scan: `bandwidth`, `matrix units` or `unpacking`; `measured` if
            it was measured.
        attend: reads of scores, residual, windows and fetched pairs.
        fetch: transfers of pairs over the link, or reads from disk.
        fetch_hidden: the part of `fetch` that runs during the rest of the step.
        overhead: everything else, if it was measured.
    """

    weights: float
    compute: float
    compute_hidden: float
    scan: float
    scan_bound: str
    attend: float
    fetch: float
    fetch_hidden: float
    overhead: float = 0.0

    @property
    def hidden(self) -> float:
        return self.compute_hidden + self.fetch_hidden

    @property
    def total(self) -> float:
        return self.weights + self.compute + self.scan + self.attend + self.fetch + self.overhead - self.hidden

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. Keys are stable; times are milliseconds."""
        times = {f"{name}_ms": value * 1e3 for name, value in asdict(self).items() if name != "scan_bound"}
        return {**times, "hidden_ms": self.hidden * 1e3, "total_ms": self.total * 1e3, "scan_bound": self.scan_bound}


class StepModel(Protocol):
    """A model of how long a step takes."""

    def step(self, method: Method, context: int, batch: int) -> StepTime:
        """Return the time of one decode step of `batch` sequences of `context` tokens."""


@dataclass(frozen=True)
class Roofline:
    """The roofline of a model on a device."""

    device: Device
    model: ModelDimensions

    def step(self, method: Method, context: int, batch: int) -> StepTime:
        """See `StepModel`."""
        traffic = step_traffic(self.model, method.config, context, batch)
        weights = traffic.weights / self.device.memory_rate
        compute = self._linear_operations(traffic, method.rows * batch) / self.device.matrix_rate
        scan, bound = self._scan(method, traffic, context, batch)
        attend = self._attended_bytes(method, traffic, context, batch) / self.device.memory_rate
        fetch, ahead = self._fetch(method, traffic)
        compute_hidden = min(compute, weights)
        rest = weights + compute - compute_hidden + scan + attend + fetch - ahead
        return StepTime(weights, compute, compute_hidden, scan, bound, attend, fetch, min(ahead, rest))

    def _linear_operations(self, traffic: StepTraffic, rows: int) -> float:
        """Return the operations of the linear layers: a multiply-add per weight that is read, and
        row.
        """
        return 2 * traffic.weights / self.model.itemsize * rows

    def _scan(self, method: Method, traffic: StepTraffic, context: int, batch: int) -> tuple[float, str]:
        read = traffic.scan / self.device.memory_rate
        if method.config.policy is Policy.FULL:
            return read, "bandwidth"
        products = codes = 0.0
        for layer in self.model.full_layers:
            tokens = batch * method.config.low_bit_length(context)
            rows = math.ceil(layer.query_heads // layer.kv_heads * method.rows / TILE_ROWS) * TILE_ROWS
            elements = tokens * layer.kv_heads * layer.head_dim  # of the keys; the values have as many
            products += 2 * 2 * elements * rows * method.kernels.products
            codes += 2 * elements
        times = {
            "bandwidth": read,
            "matrix units": products / self.device.matrix_rate,
            "unpacking": UNPACK_INSTRUCTIONS * codes / self.device.vector_rate,
        }
        bound = max(times, key=lambda one: times[one])
        return times[bound], bound

    def _attended_bytes(self, method: Method, traffic: StepTraffic, context: int, batch: int) -> int:
        config, counts, size = method.config, method.kernels, traffic.recent
        if config.policy is Policy.FULL:
            return size
        low_bit = config.low_bit_length(context)
        selecting = method.selecting_rows
        for layer in self.model.full_layers:
            scores = counts.score_passes * method.rows + counts.select_passes * selecting
            scores = scores * layer.query_heads + counts.mass_passes * selecting * layer.kv_heads
            size += batch * low_bit * scores * counts.score_bytes
            if config.policy.fetches:
                size += batch * method.rows * config.selection.of(low_bit) * layer.row_bytes(self.model.itemsize)
        return size

    def _fetch(self, method: Method, traffic: StepTraffic) -> tuple[float, float]:
        """Return (seconds of all transfers, seconds of those that were requested a step ahead)."""
        if not traffic.rows:
            return 0.0, 0.0
        config = method.config
        if config.slow_tier is SlowTierKind.RAM_INPLACE:
            return traffic.rows / self.device.memory_rate, 0.0
        seconds = traffic.rows / self.device.link_rate
        if config.slow_tier is SlowTierKind.DISK:
            seconds = max(seconds, self._disk_bytes(traffic) / self._disk_rate())
        waited = config.policy.verifies * (WAITED_FOR if config.policy.prefetches else 1.0)
        return seconds, seconds * (1 - waited)

    def _disk_bytes(self, traffic: StepTraffic) -> int:
        layer = self.model.full_layers[0]
        row = layer.row_bytes(self.model.itemsize) // layer.kv_heads
        return math.ceil(row / DISK_UNIT) * DISK_UNIT * traffic.rows // row

    def _disk_rate(self) -> float:
        if self.device.disk_gb_per_s is None:
            raise ConfigError(
                "A slow tier on disk needs the disk's bandwidth: give disk_gb_per_s (10^9 bytes per second) in a --gpu-spec file."
            )
        return self.device.disk_gb_per_s * 1e9
