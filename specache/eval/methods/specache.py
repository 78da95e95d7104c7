"""Methods that are SpeCaches: `specache` (any settings), `kivi` (low-bit pairs) and `full`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from specache.cache.cache import SpeCache
from specache.cache.sizes import ORDINARY_ITEMSIZE
from specache.config import DEFAULTS_OF_BITS, Code, Policy, SlowTierKind, SpeCacheConfig
from specache.engine.engine import Engine
from specache.eval.methods.base import Method, SessionStats
from specache.eval.prefilled import Prefilled


class SpeCacheSession:
    """Decodes with a SpeCache on the engine, greedy draft tokens included.

    Attributes:
        cache: a fork of the prompt's cache.
    """

    def __init__(self, prompt: Prefilled, config: SpeCacheConfig) -> None:
        changes = {
            f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("slow_tier", "slow_dir", "fast_memory")
        }
        self.cache: SpeCache = prompt.cache.fork(**changes)
        self._sequence = self.cache.sequences[0]
        self._engine = Engine.over(prompt.model, self.cache)
        self._run = self._engine.resume([self._sequence])

    def feed(self, token: int) -> Tensor:
        self._run.give([token], self.cache.counters)
        self._engine.step()
        assert self._run.logits is not None
        return self._run.logits[0]

    def stats(self) -> SessionStats:
        s = self.cache.stats()
        # evaluations run in float32, and are compared with a 16-bit cache
        use = self._sequence.memory(ORDINARY_ITEMSIZE)
        fast = use.full if self.cache.config.policy is Policy.FULL else use.fast
        return SessionStats(fast / use.full, use.hot / use.full, s["hit_rate"], s["guess_rate"])

    def close(self) -> None:
        self.cache.close()


@dataclass(frozen=True)
class SpeCacheMethod(Method):
    """SpeCache; the settings are the fields of `SpeCacheConfig`."""

    name: ClassVar[str] = "specache"
    summary: ClassVar[str] = "low-bit copy, 16-bit pairs fetched by policy (settings: any field of SpeCacheConfig)"
    needs_all_queries: ClassVar[bool] = False
    config: SpeCacheConfig = field(default_factory=lambda: SpeCacheConfig(slow_tier=SlowTierKind.RAM))

    def settings(self) -> dict[str, Any]:
        return self.config.resolved("cpu").to_dict()

    def defaults(self) -> dict[str, Any]:
        of_bits, pairs = DEFAULTS_OF_BITS[self.config.bits], self.config.top_k
        long = of_bits["long_top_k"] if pairs == of_bits["top_k"] else pairs  # a given `top_k` holds at every length
        return super().defaults() | of_bits | {"long_top_k": long}

    def start(self, prompt: Prefilled) -> SpeCacheSession:
        return SpeCacheSession(prompt, self.config)

    @classmethod
    def with_settings(cls, settings: dict[str, Any]) -> SpeCacheMethod:
        """Return the method of `--methods specache:top_k=32`.

        Raises:
            ConfigError: a field or a value that does not exist.
        """
        return cls(SpeCacheConfig(**{"slow_tier": SlowTierKind.RAM, **settings}))


@dataclass(frozen=True)
class FullMethod(Method):
    """The ordinary 16-bit cache: what every other method is compared with."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "the ordinary 16-bit cache"
    needs_all_queries: ClassVar[bool] = False

    def start(self, prompt: Prefilled) -> SpeCacheSession:
        return SpeCacheSession(prompt, SpeCacheConfig(slow_tier=SlowTierKind.RAM, policy=Policy.FULL))


@dataclass(frozen=True)
class KiviMethod(Method):
    """KIVI (arXiv 2402.02750): low-bit pairs alone, R = 128.

    That is as many 16-bit bytes as the paper's SpeCache has with R = 64 and k = 64 (section 4).
    """

    name: ClassVar[str] = "kivi"
    summary: ClassVar[str] = "KIVI: the low-bit copy alone, R = 128"
    needs_all_queries: ClassVar[bool] = False
    bits: int = 2
    code: Code = Code.KIVI
    group_size: int = 64
    residual: int = 128

    def start(self, prompt: Prefilled) -> SpeCacheSession:
        config = SpeCacheConfig(slow_tier=SlowTierKind.RAM, policy=Policy.NONE, **self.settings())
        return SpeCacheSession(prompt, config)
