"""Options of the benchmarks that decode with a SpeCache."""

from __future__ import annotations

from dataclasses import dataclass, field

from specache.config import Code, Policy, SpeCacheConfig


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The settings of `SpeCacheConfig` that change what a step costs."""

    bits: int = field(default=2, metadata={"help": "Bits per number of the low-bit copy: 1, 2 or 4."})
    code: Code = field(default=Code.ROTATED, metadata={"help": "How numbers become bits."})
    top_k: int = field(default=64, metadata={"help": "16-bit pairs swapped in per key-value head and step."})
    policy: Policy = field(default=Policy.AUTO, metadata={"help": "Which pairs are swapped in, and when they are fetched."})

    def config(self) -> SpeCacheConfig:
        """The configuration.

        Raises:
            ConfigError: a value is out of range.
        """
        return SpeCacheConfig(bits=self.bits, code=self.code, top_k=self.top_k, policy=self.policy)
