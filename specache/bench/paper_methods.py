"""The methods of the paper's table, and the implementation that decodes each."""

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
NAMES = {FULL: "full", KIVI: "kivi", PAPER: "paper", OWN: "specache"}  # value of `--methods` -> key in `compared_methods`
COPY_BITS = tuple(sorted(BITS, reverse=True))


@dataclass(frozen=True)
class Entry:
    """One method of the table.

    Attributes:
        name: a key of `NAMES`.
        planned: the same method as the planner knows it.
    """

    name: str
    planned: Method

    @property
    def bits(self) -> int | None:
        """Return the bits of the low-bit copy, or `None` if the method has none."""
        return None if self.name == FULL else self.planned.config.bits

    @property
    def policy(self) -> str | None:
        return None if self.name == FULL else str(self.planned.config.policy)

    @property
    def method(self) -> str:
        """Return `full`, `kivi` or `specache`. The policy tells the paper's SpeCache from ours."""
        return self.name if self.name in (FULL, KIVI) else "specache"

    def contender(self, work: Workload, fast_memory: int | None, shares_rows: bool = False) -> Contender:
        """Return the implementation that decodes `work`.

        Args:
            fast_memory: limit of our cache in bytes. transformers' cache has no limit.
            shares_rows: whether all sequences read the 16-bit rows of the first one.
        """
        if self.name == FULL:
            return DynamicContender(work)
        config = replace(self.planned.config, fast_memory=fast_memory)
        return KiviContender(work, config) if self.name == KIVI else SpeCacheContender(work, config, shares_rows)


def entries(names: Iterable[str], bits: Iterable[int], config: SpeCacheConfig) -> list[Entry]:
    """Return the methods of the table, the full cache first.

    Args:
        config: of our own method. The other methods share its fields where they apply.
    """
    known = {method.key: method for method in methods(config)}
    found = []
    for name in (name for name in NAMES if name in set(names)):
        keys = [NAMES[name]] if name == FULL else [f"{NAMES[name]}-{b}" for b in sorted(set(bits), reverse=True)]
        found += [Entry(name, known[key]) for key in keys]
    return found


class KiviContender(SpeCacheContender):
    """The low-bit copy alone: 16-bit rows are dropped once they are quantised.

    New rows are kept in the residual only.
    """

    def __init__(self, work: Workload, config: SpeCacheConfig) -> None:
        super().__init__(work, config, shares_rows=True)  # of the first sequence's there are none either

    def filled(self, sequence: Sequence) -> None:
        sequence.tier.close()
        sequence.tier = _NoRows(in_place=False)
        for layer in sequence.compressed.values():
            layer.tier = sequence.tier


class _NoRows(RamTier):
    """A slow tier that stores nothing."""

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        pass
