"""Compute the bytes per tier of a method on a device, and the largest batch that fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from specache.config import Policy, SlowTierKind
from specache.model.dimensions import ModelDimensions
from specache.planning.advice import LARGEST_BATCH, largest
from specache.planning.plan import plan, uniform_batch
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.device_figures import GIB, Device
from specache.planning.roofline.kernel_costs import THIS_LIBRARY
from specache.planning.roofline.static_step import static_step_bytes


@dataclass(frozen=True)
class TierBytes:
    """Bytes of a batch, by tier.

    Attributes:
        weights: the model's parameters, in fast memory.
        fast: everything else in fast memory, at the peak of prefilling and decoding.
        static: the part of `fast` that a step over static GPU buffers holds beyond the ordinary
            step.
        slow: 16-bit pairs in the slow tier.
    """

    weights: int
    fast: int
    slow: int
    static: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. Keys are stable."""
        return {f"{name}_bytes": value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Capacity:
    """The batches that fit into a device's memory."""

    device: Device
    model: ModelDimensions
    _largest: dict[tuple[str, int], int] = field(default_factory=dict, repr=False, compare=False)

    def bytes(self, method: Method, context: int, batch: int) -> TierBytes:
        """Return the bytes of `batch` sequences of `context` tokens."""
        planned = plan(self.model, method.config, uniform_batch(context, batch))
        fast = planned.fast
        if method.config.policy is Policy.FULL:  # the pairs alone, without the room that a buffer of ours keeps to grow
            spare = planned.widest.full_cache + planned.widest.windows - planned.full_cache * self.model.itemsize // 2
            fast -= max(0, spare)
        on_gpu = self.device.kind != "cpu" and method.kernels is THIS_LIBRARY  # other kernels have no such step
        static = static_step_bytes(self.model, method.config, context, batch) if on_gpu else 0
        return TierBytes(planned.weights, fast + static, planned.slow if method.keeps_slow else 0, static)

    def fits(self, method: Method, context: int, batch: int) -> bool:
        """Return True if `batch` sequences of `context` tokens fit into the device's and the host's
        memory.
        """
        needed = self.bytes(method, context, batch)
        host, on_disk = self.device.host_memory_gib, method.config.slow_tier is SlowTierKind.DISK
        in_host = host is None or on_disk or needed.slow <= host * GIB
        return in_host and self._in_memory(needed, method) <= self.device.usable_bytes

    def largest_batch(self, method: Method, context: int) -> int:
        """Return the most sequences of `context` tokens that fit; 0 if none does."""
        key = (method.key, context)
        if key not in self._largest:
            self._largest[key] = self._search(method, context)
        return self._largest[key]

    def _search(self, method: Method, context: int) -> int:
        """Search for the largest batch, starting from a linear estimate: needs grow almost in
        proportion to it.
        """
        if not self.fits(method, context, 1):
            return 0
        one, few = (self._in_memory(self.bytes(method, context, batch), method) for batch in (1, 9))
        start = max(1, min(LARGEST_BATCH, 1 + 8 * (self.device.usable_bytes - one) // max(few - one, 1)))
        while start > 1 and not self.fits(method, context, start):
            start -= max(1, start // 64)
        return largest(lambda batch: self.fits(method, context, batch), start, LARGEST_BATCH)

    def _in_memory(self, needed: TierBytes, method: Method) -> int:
        """Return the bytes in the device's own memory.

        A CPU's also holds the slow tier, unless that is a disk.
        """
        shares = self.device.kind == "cpu" and method.config.slow_tier is not SlowTierKind.DISK
        return needed.weights + needed.fast + (needed.slow if shares else 0)
