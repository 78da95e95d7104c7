"""Options of the benchmarks that decode with a SpeCache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from specache.config import Code, Policy, SpeCacheConfig


@dataclass(frozen=True, kw_only=True)
class CopyOptions:
    """The settings of `SpeCacheConfig` that size the low-bit copy and the pairs swapped in."""

    bits: int = field(default=2, metadata={"help": "Bits per number of the low-bit copy: 1, 2 or 4."})
    code: Code = field(default=Code.ROTATED, metadata={"help": "How numbers become bits."})
    top_k: int | None = field(
        default=None, metadata={"help": "16-bit pairs swapped in per key-value head and step. Default: that of the bits."}
    )

    def config(self, **settings: Any) -> SpeCacheConfig:
        """Return the configuration with these and further settings.

        Raises:
            ConfigError: a value is out of range.
        """
        pairs: dict[str, Any] = {} if self.top_k is None else {"top_k": self.top_k}
        return SpeCacheConfig(bits=self.bits, code=self.code, **pairs, **settings)


@dataclass(frozen=True, kw_only=True)
class CacheOptions(CopyOptions):
    """`CopyOptions` and the policy: every setting that changes the cost of a step."""

    policy: Policy = field(default=Policy.AUTO, metadata={"help": "Which pairs are swapped in, and when they are fetched."})

    def config(self, **settings: Any) -> SpeCacheConfig:
        """Return the configuration with these and further settings (see `CopyOptions.config`)."""
        return super().config(policy=self.policy, **settings)


@dataclass(frozen=True, kw_only=True)
class TierOptions(CopyOptions):
    """`CopyOptions` and the hot set's size, for benchmarks that copy rows from a slow tier."""

    hot_set: float = field(
        default=0.08, metadata={"help": "Recently fetched rows that are kept, as a fraction of the 16-bit cache."}
    )

    def config(self, **settings: Any) -> SpeCacheConfig:
        """Return the configuration with these and further settings (see `CopyOptions.config`)."""
        return super().config(hot_set=self.hot_set, **settings)
