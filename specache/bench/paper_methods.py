"""What the paper's table compares, and each method as something that decodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from specache.bench.contenders import Contender, DynamicContender, SpeCacheContender
from specache.bench.workload import Workload
from specache.cache.sequence import Sequence
from specache.config import SpeCacheConfig
from specache.planning.roofline.compared_methods import BITS, Method, methods
from specache.tiers.ram import RamTier

FULL, KIVI, PAPER, OWN = "full", "kivi", "speculative", "verified"
NAMES = {FULL: "full", KIVI: "kivi", PAPER: "paper", OWN: "specache"}  # as `--methods` has them -> as `roofline.methods` does
COPY_BITS = tuple(sorted(BITS, reverse=True))


@dataclass(frozen=True)
class Entry:
    """A line of the table at one context.

    Attributes:
        name: of `NAMES`.
        planned: the same method as the planner knows it.
    """

    name: str
    planned: Method

    @property
    def bits(self) -> int | None:
        """Of the low-bit copy, if the method has one."""
        return None if self.name == FULL else self.planned.config.bits

    @property
    def policy(self) -> str | None:
        return None if self.name == FULL else str(self.planned.config.policy)

    @property
    def method(self) -> str:
        """`full`, `kivi` or `specache`; the policy tells the paper's SpeCache from ours."""
        return self.name if self.name in (FULL, KIVI) else "specache"

    def contender(self, work: Workload, fast_memory: int | None) -> Contender:
        """What decodes `work`.

        Args:
            fast_memory: the limit that our cache keeps to; transformers' knows none.
        """
        if self.name == FULL:
            return DynamicContender(work)
        config = replace(self.planned.config, fast_memory=fast_memory)
        return KiviContender(work, config) if self.name == KIVI else SpeCacheContender(work, config)


def entries(names: Iterable[str], bits: Iterable[int], config: SpeCacheConfig) -> list[Entry]:
    """The lines of the table, the full cache first.

    Args:
        config: of our own method; the others share what they have in common with it.
    """
    known = {method.key: method for method in methods(config)}
    found = []
    for name in (name for name in NAMES if name in set(names)):
        keys = [NAMES[name]] if name == FULL else [f"{NAMES[name]}-{b}" for b in sorted(set(bits), reverse=True)]
        found += [Entry(name, known[key]) for key in keys]
    return found


class KiviContender(SpeCacheContender):
    """The low-bit copy alone: 16-bit rows are gone once they are quantised, and new ones are kept in the residual only."""

    def filled(self, sequence: Sequence) -> None:
        sequence.tier.close()
        sequence.tier = _NoRows(in_place=False)
        for layer in sequence.compressed.values():
            layer.tier = sequence.tier


class _NoRows(RamTier):
    """A slow tier that keeps nothing."""

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        pass
