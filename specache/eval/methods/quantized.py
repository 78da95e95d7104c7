"""transformers' own `QuantizedCache`, with hqq or quanto: what `generate(cache_implementation="quantized")` runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from transformers import QuantizedCache

from specache.errors import ConfigError, MethodUnavailableError
from specache.eval.methods.stock import StockSession, tensor_bytes
from specache.eval.prefilled import Prefilled

PACKAGES = {"hqq": "hqq", "quanto": "optimum-quanto"}
AXES = {"hqq": 1, "quanto": 0}  # what transformers' guide recommends for each
BITS = {"hqq": (1, 2, 4, 8), "quanto": (2, 4)}  # hqq's 3 bits do not decode to the shape of a cache


@dataclass(frozen=True)
class QuantizedMethod:
    """Low-bit codes, and up to `residual_length` new tokens in the model's dtype.

    As in stock generation the whole prompt is quantised when it ends, and whenever the residual is full everything is: the codes of
    codes. hqq packs whole bytes only: tokens of the prompt that would fill a part of one begin the residual (stock generation fails
    at such lengths). Bytes are those of the tensors, codes, scales and zero points, residual, the floating-point ones at 16 bits.
    The whole layer in the model's dtype that every step makes from them is not counted.
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

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def start(self, prompt: Prefilled) -> StockSession:
        cache = self._new_cache(prompt)
        device = prompt.cache.info.device
        for index in prompt.full_layers:
            keys, values = prompt.rows(index)
            elements = keys[:, 0].numel()
            if elements % self.q_group_size:
                raise ConfigError(f"q_group_size ({self.q_group_size}) has to divide the {elements} elements of a token's keys.")
            keys, values = keys[None].to(device), values[None].to(device)  # [1, Hkv, S, D]
            whole = prompt.length - prompt.length % self._tokens_of_whole_bytes(elements)
            cache.update(keys[:, :, :whole], values[:, :, :whole], index)
            if whole < prompt.length:
                cache.update(keys[:, :, whole:], values[:, :, whole:], index)
        return StockSession(prompt, cache, quantized_bytes)

    def _tokens_of_whole_bytes(self, elements: int) -> int:
        """The number of tokens, each of `elements`, of which only multiples can be quantised.

        Raises:
            ConfigError: `residual_length` is none.
        """
        if self.backend != "hqq":
            return 1  # quanto fills up the last byte
        together = 8 // self.bits  # groups whose codes share bytes
        tokens = together // math.gcd(together, elements // self.q_group_size)
        if self.residual_length % tokens:
            raise ConfigError(f"residual_length is a multiple of {tokens} with hqq and this model, got {self.residual_length}.")
        return tokens

    def _new_cache(self, prompt: Prefilled) -> Any:
        axis = AXES[self.backend]
        try:
            return QuantizedCache(
                backend=self.backend,
                config=prompt.model.config.get_text_config(decoder=True),
                nbits=self.bits,
                axis_key=axis,
                axis_value=axis,
                q_group_size=self.q_group_size,
                residual_length=self.residual_length,
            )
        except ImportError as error:
            raise MethodUnavailableError(
                f"Method 'quantized' with backend {self.backend!r} needs a library: pip install {PACKAGES[self.backend]}"
            ) from error
        except ValueError as error:
            raise MethodUnavailableError(f"Method 'quantized' cannot run this model: {error}") from error


def quantized_bytes(cache: Any) -> int:
    """Bytes of a QuantizedCache's tensors."""
    return sum(tensor_bytes([s._quantized_keys, s._quantized_values, s.keys, s.values]) for s in cache.layers)
