"""YAKV (arXiv 2604.08426): keys are chosen one by one by the scores of their low-bit copy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from specache.attention.dense import attend_part, merge
from specache.cache.sizes import ORDINARY_ITEMSIZE, page_layout
from specache.config import Code, SpeCacheConfig
from specache.errors import ConfigError
from specache.eval.methods.dense_cache import DenseMethod, KeptRows, LayerState, rows_on_device
from specache.eval.methods.key_copy import KeyCopy
from specache.eval.methods.offloaded_rows import POSITION_BYTES, FetchedRows, OffloadedRows, check_reduction, choose
from specache.eval.prefilled import Prefilled
from specache.kernels.types import AttentionParams
from specache.low_bit.key_scales import KeyScales
from specache.model.dimensions import row_bytes


class YAKVLayer(LayerState):
    """Low-bit keys and the newest rows in fast memory, all other rows in slow memory.

    Args:
        rows: keys and values [Hkv, S, D] of the prompt, on the model's device.
        slow: the same in slow memory.
        copy: the low-bit keys of all tokens but the newest.
        config: `residual` newest tokens, and the groups of the copy.
        top_k: keys chosen per KV head and step.
        reduction: joins the query heads of a KV head, `mean` or `max`.

    Attributes:
        recent: the newest tokens: `R` to `R + g - 1`, and in a step its own.
        fetched: the rows that the last step chose.
    """

    def __init__(
        self,
        rows: tuple[Tensor, Tensor],
        slow: tuple[Tensor, Tensor],
        copy: KeyCopy,
        config: SpeCacheConfig,
        top_k: int,
        reduction: str,
    ) -> None:
        keys, values = rows
        self._config = config
        self._top_k = top_k
        self._reduction = reduction
        self.copy = copy
        older = copy.length
        self._slow = OffloadedRows(slow[0][:, :older], slow[1][:, :older])
        self.recent = KeptRows(keys[:, older:], values[:, older:])
        self.fetched = FetchedRows(self._slow, top_k, like=keys)

    @property
    def nbytes(self) -> int:
        heads, _, dim = self.recent.keys.shape
        return self.copy.nbytes + recent_bytes(self._config, heads, dim)

    @property
    def hot_nbytes(self) -> int:
        return self.fetched.nbytes

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        self.recent.append(keys, values)
        parts = [attend_part(query, self.recent.keys, self.recent.values, params)]
        if self.copy.length:
            positions = self._choose(query, parts[0][1], params)
            parts.append(attend_part(query, *self.fetched.take(positions), params))
            self.needed, self.hits = self.fetched.needed, self.fetched.hits
        out = merge(parts, params.sinks)[0]
        self._offload_oldest()
        return out

    def _choose(self, query: Tensor, recent_lse: Tensor, params: AttentionParams) -> Tensor:
        """Return the keys [Hkv, k] with the largest probability under the copy, ascending.

        Args:
            query: [Hq, 1, D].
            recent_lse: [Hq, 1], the log-sum-exp of the newest tokens' scores.
        """
        score = self.copy.scores(query, params)  # [Hkv, G, S]
        rest = recent_lse.reshape(*score.shape[:2], 1)
        if params.sinks is not None:
            rest = torch.logaddexp(rest, params.sinks.float().reshape(rest.shape))
        probabilities = (score - torch.logaddexp(score.logsumexp(-1, keepdim=True), rest)).exp_()
        return choose(probabilities, self._top_k, self._reduction)

    def _offload_oldest(self) -> None:
        """Move the oldest of the newest tokens to slow memory and to the copy, whole groups."""
        count = self._config.low_bit_length(self.copy.length + self.recent.count) - self.copy.length
        if not count:
            return
        keys, values = self.recent.keys, self.recent.values
        self.copy.append(keys[:, :count])
        self._slow.append(keys[:, :count], values[:, :count])
        self.recent = KeptRows(keys[:, count:].clone(), values[:, count:].clone())


@dataclass(frozen=True)
class YAKVMethod(DenseMethod):
    """Keys chosen one by one with a 2-bit copy. Only they and the newest tokens are attended to.

    Fast memory holds the low-bit keys, the newest `recent` to `recent + group_size - 1` tokens, and
    the rows of the last step (the hot ratio). Values have no copy. A step scores every key of the
    copy, fetches the `top_k` pairs per KV head with the largest probability at 16 bits, and takes
    the softmax over these and the newest tokens alone.

    Ours, not the paper's: the codes of the copy are specache's (key scales of the rotated code are
    computed from all keys of the prompt and its newest queries), and query heads that share a KV
    head choose together: `reduction` takes the mean or the maximum of their probabilities.
    """

    name: ClassVar[str] = "yakv"
    summary: ClassVar[str] = "YAKV: keys chosen one by one with a 2-bit copy of the keys, and the newest tokens"
    needs_all_queries: ClassVar[bool] = False
    top_k: int | None = field(
        default=None, metadata={"help": "keys chosen per KV head and step, whatever the budget; none: as many as the budget leaves"}
    )
    recent: int = field(default=64, metadata={"help": "newest tokens that are always attended to"})
    bits: int = field(default=2, metadata={"help": "bits of a key's element in the copy"})
    code: Code = field(default=Code.ROTATED, metadata={"help": "code of the copy: rotated or kivi"})
    group_size: int = field(default=64, metadata={"help": "tokens of a group of the copy"})
    reduction: str = field(default="mean", metadata={"help": "how query heads that share a KV head choose together: mean or max"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is a positive number of keys or none, got {self.top_k}.")
        object.__setattr__(self, "code", self.config.code)
        check_reduction(self.reduction)

    @property
    def config(self) -> SpeCacheConfig:
        """Return the settings of the copy. Raise `ConfigError` if they are refused."""
        return SpeCacheConfig(bits=self.bits, code=self.code, group_size=self.group_size, residual=self.recent)

    def layer(self, prompt: Prefilled, index: int) -> YAKVLayer:
        keys, values = rows_on_device(prompt, index)
        heads, length, dim = keys.shape
        config = self.config
        copy = KeyCopy(page_layout(config, heads, dim), keys.device, self._key_scales(prompt, index, keys))
        older = config.low_bit_length(length)
        if older:
            copy.append(keys[:, :older])
        row = row_bytes(heads, dim, ORDINARY_ITEMSIZE)
        left = self.budget * length * row - copy.nbytes - recent_bytes(config, heads, dim)
        top_k = self.top_k or max(1, int(left / (row + heads * POSITION_BYTES)))
        return YAKVLayer((keys, values), prompt.rows(index), copy, config, top_k, self.reduction)

    def _key_scales(self, prompt: Prefilled, index: int, keys: Tensor) -> Tensor | None:
        """Return the key scales [Hkv, D] of the rotated code from the prompt's keys [Hkv, S, D]."""
        if self.code is not Code.ROTATED:
            return None
        scales = KeyScales(keys.shape[1])
        scales.observe(0, prompt.queries(index), keys.shape[0])
        return scales.fix(keys)


def recent_bytes(config: SpeCacheConfig, heads: int, dim: int) -> int:
    """Return the bytes of the buffer of the newest tokens: `R + g` rows."""
    return (config.residual + config.group_size) * row_bytes(heads, dim, ORDINARY_ITEMSIZE)
