"""What a roofline compares: the 16-bit cache, KIVI, the paper's SpeCache and this library's, at 2 bits and at 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from specache.config import Code, Policy, SpeCacheConfig
from specache.planning.roofline.kernel_costs import PUBLISHED, THIS_LIBRARY, KernelCounts

BITS = (2, 1)
KIVI_RESIDUAL = 128  # tokens; with R = 64 and k = 64 SpeCache holds as many 16-bit pairs (paper, section 4.1)


@dataclass(frozen=True)
class Method:
    """One cache.

    Attributes:
        key: stable, for JSON.
        title: for people.
        config: with every `auto` decided.
        keeps_slow: whether 16-bit rows stay in a slow tier.
        kernels: what runs it: this library's kernels, or the published ones.
    """

    key: str
    title: str
    config: SpeCacheConfig
    keeps_slow: bool
    kernels: KernelCounts = PUBLISHED

    @property
    def rows(self) -> int:
        """Rows per sequence of a decode step: a guess beside the real token makes two."""
        return 2 if self.config.policy.drafts else 1

    @property
    def selecting_rows(self) -> int:
        """Rows per sequence whose `k` largest probabilities are looked for: of the paper's two the guess alone."""
        policy = self.config.policy
        if policy is Policy.VERIFIED:
            return 2
        return 1 if policy.verifies or policy.prefetches else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "method": self.key,
            "title": self.title,
            "bits": None if self.key == "full" else self.config.bits,
            "policy": str(self.config.policy),
            "kernels": self.kernels.to_dict(),
        }


def methods(config: SpeCacheConfig) -> list[Method]:
    """The methods to compare, the full cache first.

    Args:
        config: of this library's own rows, with every `auto` decided. The others share its `k`, `g` and slow tier.
    """
    config = replace(config, fast_memory=None)
    own_bits = sorted({*BITS, config.bits}, reverse=True)
    kivi = replace(config, code=Code.KIVI, policy=Policy.NONE, residual=KIVI_RESIDUAL, hot_set=0.0)
    paper = replace(config, code=Code.KIVI, policy=Policy.SPECULATIVE, residual=64, hot_set=0.0)
    found = [Method("full", "16-bit cache", replace(config, policy=Policy.FULL), False)]
    found += [Method(f"kivi-{bits}", f"KIVI, {bits}-bit", replace(kivi, bits=bits), False) for bits in BITS]
    found += [Method(f"paper-{bits}", f"SpeCache (paper), {bits}-bit", replace(paper, bits=bits), True) for bits in BITS]
    if config.policy is not Policy.FULL:
        own = f"SpeCache {config.policy}"
        found += [
            Method(f"specache-{bits}", f"{own}, {bits}-bit", replace(config, bits=bits), True, THIS_LIBRARY) for bits in own_bits
        ]
    return found
