"""Quest (Tang et al., ICML 2024): pages whose keys' bounds promise the largest scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from specache.attention.dense import attend_part, merge
from specache.cache.sizes import ORDINARY_ITEMSIZE
from specache.errors import ConfigError
from specache.eval.methods.dense_cache import DenseMethod, KeptRows, LayerState, rows_on_device
from specache.eval.methods.offloaded_rows import POSITION_BYTES, FetchedRows, OffloadedRows, check_reduction, choose
from specache.eval.prefilled import Prefilled
from specache.kernels.types import AttentionParams
from specache.model.dimensions import row_bytes


class FullLayer(LayerState):
    """A layer that keeps and attends to every row.

    Args:
        keys, values: [Hkv, S, D] of the prompt, on the model's device.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._rows = KeptRows(keys, values)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        self._rows.append(keys, values)
        return self._rows.attend(query, params)


class QuestLayer(LayerState):
    """Bounds of every page and the newest page in fast memory, all full pages in slow memory.

    Args:
        rows: keys and values [Hkv, S, D] of the prompt, on the model's device.
        slow: the same in slow memory.
        page_size: tokens of a page.
        pages: full pages chosen per KV head and step.
        reduction: joins the query heads of a KV head, `mean` or `max`.

    Attributes:
        bounds: [2, Hkv, full pages, D], the minimum and maximum of each page's keys per channel.
        newest: the rows of the page that is not full, and in a step its own.
        fetched: the pages that the last step chose.
    """

    def __init__(
        self, rows: tuple[Tensor, Tensor], slow: tuple[Tensor, Tensor], page_size: int, pages: int, reduction: str
    ) -> None:
        keys, values = rows
        full = keys.shape[1] // page_size * page_size
        self._page_size = page_size
        self._pages = pages
        self._reduction = reduction
        self.bounds = self._bounds_of(keys[:, :full])
        self._slow = OffloadedRows(slow[0][:, :full], slow[1][:, :full], page_size)
        self.newest = KeptRows(keys[:, full:], values[:, full:])
        self.fetched = FetchedRows(self._slow, pages, like=keys)

    @property
    def nbytes(self) -> int:
        heads, _, dim = self.newest.keys.shape
        return ORDINARY_ITEMSIZE * self.bounds.numel() + self._page_size * row_bytes(heads, dim, ORDINARY_ITEMSIZE)

    @property
    def hot_nbytes(self) -> int:
        return self.fetched.nbytes

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        self.newest.append(keys, values)
        parts = [attend_part(query, self.newest.keys, self.newest.values, params)]
        if self._slow.count:
            parts.append(attend_part(query, *self.fetched.take(self._choose(query)), params))
            self.needed, self.hits = self.fetched.needed, self.fetched.hits
        if self.newest.count == self._page_size:
            self._offload_newest()
        return merge(parts, params.sinks)[0]

    def _choose(self, query: Tensor) -> Tensor:
        """Return the full pages [Hkv, p] with the largest bounds of `q . k`, ascending.

        The bound of a page is `sum_d max(q_d min_d, q_d max_d)`.

        Args:
            query: [Hq, 1, D].
        """
        low, high = self.bounds.float().unsqueeze(2)  # [Hkv, 1, pages, D] each
        grouped = query[:, 0].float().unflatten(0, (len(low), -1)).unsqueeze(2)  # [Hkv, G, 1, D]
        bound = torch.maximum(grouped * low, grouped * high).sum(-1)  # [Hkv, G, pages]
        return choose(bound, self._pages, self._reduction)

    def _offload_newest(self) -> None:
        """Move the newest page, now full, to slow memory, and keep its bounds."""
        keys, values = self.newest.keys, self.newest.values
        self.bounds = torch.cat([self.bounds, self._bounds_of(keys)], dim=2)
        self._slow.append(keys, values)
        self.newest = KeptRows(keys[:, :0], values[:, :0])

    def _bounds_of(self, keys: Tensor) -> Tensor:
        """Return minimum and maximum of keys [Hkv, n, D], whole pages -> [2, Hkv, pages, D]."""
        pages = keys.unflatten(1, (keys.shape[1] // self._page_size, self._page_size))
        return torch.stack([pages.amin(2), pages.amax(2)])


@dataclass(frozen=True)
class QuestMethod(DenseMethod):
    """The pages whose minimum and maximum key promise the largest scores, and the newest page.

    The paper keeps all pairs on the GPU and saves reads, not memory: with the bounds, 1.06x of the
    cache at 16 tokens per page. Here it is counted as a method that offloads: the bounds and the
    newest page are fast memory, the pages of the last step are the hot ratio, and full pages are
    read from slow memory. The first `full_layers` layers of the model, sliding ones included,
    attend to everything and keep it in fast memory; their bytes are part of the budget. As in the
    authors' kernels, the newest page is always attended to, and is part of `token_budget`. There
    every query head chooses pages of its own. Here those that share a KV head choose together, so
    that a page is read once: `reduction` takes the mean or the maximum of their bounds.
    """

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "Quest: the pages whose minimum and maximum key promise the largest scores"
    needs_all_queries: ClassVar[bool] = False
    token_budget: int | None = field(
        default=None,
        metadata={"help": "tokens attended to per KV head, whatever the budget; none: as many as the budget leaves"},
    )
    page_size: int = field(default=16, metadata={"help": "tokens of a page"})
    full_layers: int = field(default=2, metadata={"help": "first layers of the model that attend to everything"})
    reduction: str = field(default="max", metadata={"help": "how query heads that share a KV head choose together: mean or max"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page_size < 1:
            raise ConfigError(f"page_size is 1 token or more, got {self.page_size}.")
        if self.token_budget is not None and self.token_budget < 2 * self.page_size:
            raise ConfigError(
                f"token_budget is at least two pages ({2 * self.page_size} tokens): the newest and a chosen one, "
                f"got {self.token_budget}. Raise it or lower page_size."
            )
        check_reduction(self.reduction)

    def layer(self, prompt: Prefilled, index: int) -> LayerState:
        keys, values = rows_on_device(prompt, index)
        if index < self.full_layers:
            return FullLayer(keys, values)
        pages = self._pages(prompt.length, self._share(prompt), keys.shape[2])
        return QuestLayer((keys, values), prompt.rows(index), self.page_size, pages, self.reduction)

    def _share(self, prompt: Prefilled) -> float:
        """Return the part of the other layers' cache that the budget leaves beside full layers."""
        sizes = {index: prompt.rows(index)[0][:, 0].numel() for index in prompt.full_layers}
        full = sum(size for index, size in sizes.items() if index < self.full_layers)
        rest = sum(sizes.values()) - full
        return (self.budget * (full + rest) - full) / rest

    def _pages(self, length: int, share: float, dim: int) -> int:
        """Return the full pages to choose per KV head, at least 1.

        Args:
            share: fraction of a layer's 16-bit cache that it may keep.
        """
        if self.token_budget is not None:
            return self.token_budget // self.page_size - 1
        row = row_bytes(1, dim, ORDINARY_ITEMSIZE)
        bounds = length // self.page_size * row  # a key twice: as large as a pair
        page = self.page_size * row
        return max(1, int((share * length * row - bounds - page) / (page + POSITION_BYTES)))
