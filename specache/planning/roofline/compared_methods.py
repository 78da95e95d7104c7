"""The methods that a roofline compares: the 16-bit cache, KIVI, the paper's SpeCache and this
library's, at 2 and 1 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from specache.config import Code, Policy, SpeCacheConfig
from specache.planning.roofline.kernel_costs import PUBLISHED, THIS_LIBRARY, KernelCounts

BITS = (2, 1)
PAPER_RESIDUAL = PAPER_PAIRS = 64  # R in tokens, and k (paper, section 4.1)
KIVI_RESIDUAL = 128  # tokens; as many 16-bit pairs as the paper's SpeCache holds


@dataclass(frozen=True)
class Method:
    """One cache method.

    Attributes:
        key: stable name, for JSON.
        title: name for display.
        config: settings with every `auto` resolved.
        keeps_slow: True if 16-bit pairs stay in a slow tier.
        kernels: work of the kernels that run it: this library's, or the published ones.
    """

    key: str
    title: str
    config: SpeCacheConfig
    keeps_slow: bool
    kernels: KernelCounts = PUBLISHED

    @property
    def rows(self) -> int:
        """Return the query rows per sequence of a decode step: two if a draft token runs beside the
        real one.
        """
        return 2 if self.config.policy.drafts else 1

    @property
    def selecting_rows(self) -> int:
        """Return the query rows per sequence that select their top-k pairs: of the paper's two only
        the draft's.
        """
        return self.config.policy.verifies + self.config.policy.prefetches

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "method": self.key,
            "title": self.title,
            "bits": None if self.key == "full" else self.config.bits,
            "policy": str(self.config.policy),
            "kernels": self.kernels.to_dict(),
        }


def methods(config: SpeCacheConfig) -> list[Method]:
    """Return the methods to compare, the full cache first.

    Args:
        config: settings of this library's methods, with every `auto` resolved. The others share its
            `g` and slow tier, and a `k` that was set.
    """
    own = {bits: config.with_changes(bits=bits, fast_memory=None) for bits in sorted({*BITS, config.bits}, reverse=True)}
    paper_pairs = PAPER_PAIRS if "top_k" in config.left_open else config.top_k
    config = replace(config, fast_memory=None)
    kivi = replace(config, code=Code.KIVI, policy=Policy.NONE, residual=KIVI_RESIDUAL, hot_set=0.0)
    paper = replace(config, code=Code.KIVI, policy=Policy.SPECULATIVE, residual=PAPER_RESIDUAL, hot_set=0.0)
    paper = replace(paper, top_k=paper_pairs, long_top_k=paper_pairs)
    found = [Method("full", "16-bit cache", replace(config, policy=Policy.FULL), False)]
    found += [Method(f"kivi-{bits}", f"KIVI, {bits}-bit", replace(kivi, bits=bits), False) for bits in BITS]
    found += [Method(f"paper-{bits}", f"SpeCache (paper), {bits}-bit", replace(paper, bits=bits), True) for bits in BITS]
    if config.policy is not Policy.FULL:
        name = f"SpeCache {config.policy}"
        found += [Method(f"specache-{bits}", f"{name}, {bits}-bit", one, True, THIS_LIBRARY) for bits, one in own.items()]
    return found
