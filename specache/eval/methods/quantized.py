"""transformers' own `QuantizedCache`, as `generate(cache_implementation="quantized")` runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from specache.errors import ConfigError, MethodUnavailableError
from specache.eval.methods.base import Method
from specache.eval.methods.stock import StockSession, tensor_bytes
from specache.eval.prefilled import Prefilled
from specache.model.quantized_cache import PACKAGES, new_quantized_cache, store_prompt

BITS = {"hqq": (1, 2, 4, 8), "quanto": (2, 4)}  # hqq's 3-bit codes decode to another shape


@dataclass(frozen=True)
class QuantizedMethod(Method):
    """Low-bit codes, and up to `residual_length` new tokens in the model's dtype.

    As in stock generation, the whole prompt is quantised when it ends (see `quantised_tokens`).
    Whenever the residual is full, everything is quantised again, codes included. Memory counts
    codes, scales, zero points and residual, floating-point tensors at 16 bits. The whole layer that
    every step dequantises is not counted.
    """

    name: ClassVar[str] = "quantized"
    summary: ClassVar[str] = "transformers' QuantizedCache (needs hqq or optimum-quanto)"
    needs_all_queries: ClassVar[bool] = False
    backend: str = field(default="hqq", metadata={"help": "hqq or quanto"})
    bits: int = field(default=2, metadata={"help": "bits of a code"})
    q_group_size: int = field(default=64, metadata={"help": "elements that share a scale"})
    residual_length: int = field(default=128, metadata={"help": "newest tokens in the model's dtype, at most"})

    def __post_init__(self) -> None:
        if self.backend not in PACKAGES:
            raise ConfigError(f"backend is one of {', '.join(PACKAGES)}, got {self.backend!r}.")
        if self.bits not in BITS[self.backend]:
            raise ConfigError(f"bits is one of {', '.join(map(str, BITS[self.backend]))} with {self.backend}, got {self.bits}.")
        if self.residual_length < 1:
            raise ConfigError(f"residual_length is 1 or more, got {self.residual_length}.")

    def start(self, prompt: Prefilled) -> StockSession:
        cache = self._new_cache(prompt)
        device = prompt.cache.info.device
        for index in prompt.full_layers:
            keys, values = prompt.rows(index)
            store_prompt(cache, index, keys[None].to(device), values[None].to(device))  # [1, Hkv, S, D]
        return StockSession(prompt, cache, quantized_bytes)

    def _new_cache(self, prompt: Prefilled) -> Any:
        try:
            return new_quantized_cache(prompt.model, self.backend, self.bits, self.q_group_size, self.residual_length)
        except ImportError as error:
            raise MethodUnavailableError(
                f"Method 'quantized' with backend {self.backend!r} needs a library: pip install {PACKAGES[self.backend]}"
            ) from error
        except ValueError as error:
            raise MethodUnavailableError(f"Method 'quantized' cannot run this model: {error}") from error


def quantized_bytes(cache: Any) -> int:
    """Return the bytes of a QuantizedCache's tensors."""
    return sum(tensor_bytes([s._quantized_keys, s._quantized_values, s.keys, s.values]) for s in cache.layers)
