"""Block retrieval as in InfLLM (Xiao et al., 2024): sinks, a local window and retrieved blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from specache.attention.dense import attend_part, merge
from specache.cache.sizes import ORDINARY_ITEMSIZE
from specache.errors import ConfigError
from specache.eval.methods.dense_cache import DenseMethod, KeptRows, LayerState, rows_on_device, take_rows
from specache.eval.prefilled import Prefilled
from specache.kernels.types import AttentionParams
from specache.model.dimensions import row_bytes

SCORE_BYTES = 4  # per local token: its representative score (float32)
Rows = tuple[Tensor, Tensor]  # keys and values [Hkv, n, D]


@dataclass(frozen=True)
class BlockPlan:
    """The budget of an InfLLM layer, in rows per KV head.

    Attributes:
        sinks: first tokens, always kept.
        local: newest tokens, always kept. Up to one block more is kept until its tokens leave
            together.
        block: tokens of a block.
        slots: blocks that the buffer holds.
        representatives: tokens that represent a block.
    """

    sinks: int
    local: int
    block: int
    slots: int
    representatives: int


class InfLLMLayer(LayerState):
    """Local rows in fast memory, blocks in slow memory, and a buffer of retrieved blocks.

    The relevance of a block is the sum over its representatives of `q . key` (InfLLM equation 2).
    That is `q` times the sum of their keys, so fast memory holds only this sum per block.

    Args:
        keys, values: [Hkv, S, D] of the prompt, on the model's device.
        slow: the same in slow memory.
        query: [Hq, S, D] of the prompt.

    Attributes:
        sinks, local: the rows that are always attended.
        blocks: the other rows, [Hkv, block, D] each, in slow memory.
        summaries: [Hkv, blocks, D], the sum of each block's representative keys.
        buffer: rows [2, Hkv, slots, block, D] of the blocks `buffer_ids` [Hkv, slots]; -1 is none.
    """

    def __init__(self, keys: Tensor, values: Tensor, slow: Rows, query: Tensor, plan: BlockPlan) -> None:
        heads, length, dim = keys.shape
        self.plan = plan
        self.blocks: list[Rows] = []
        self.summaries = keys.new_empty(heads, 0, dim)
        span = plan.local + plan.block
        scores = representative_scores(query, keys, span)  # [Hkv, S]
        followers = torch.arange(length - 1, -1, -1, device=keys.device).clamp(max=span)  # queries that each score sums
        start = min(plan.sinks, length)
        while length - start >= span:
            stop = start + plan.block
            self._summarise(keys[:, start:stop], scores[:, start:stop], followers[start:stop])
            self.blocks.append((slow[0][:, start:stop], slow[1][:, start:stop]))
            start = stop
        first = min(plan.sinks, length)
        self.sinks = KeptRows(keys[:, :first], values[:, :first])
        self.local = KeptRows(keys[:, start:], values[:, start:])
        self._scores = scores[:, start:].clone()
        self.buffer_ids = torch.full((heads, plan.slots), -1)
        self.buffer = keys.new_zeros(2, heads, plan.slots, plan.block, dim)

    @property
    def nbytes(self) -> int:
        return self.sinks.nbytes + self.local.nbytes + self._scores.nbytes + ORDINARY_ITEMSIZE * self.summaries.numel()

    @property
    def hot_nbytes(self) -> int:
        return ORDINARY_ITEMSIZE * self.buffer.numel()

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        grouped = query[:, 0].float().unflatten(0, (keys.shape[0], -1)).mean(1)  # [Hkv, D]
        self._scores += torch.einsum("hd,hmd->hm", grouped, self.local.keys.float())
        self.local.append(keys, values)
        self._scores = torch.nn.functional.pad(self._scores, (0, 1))
        parts = [attend_part(query, rows.keys, rows.values, params) for rows in (self.sinks, self.local) if rows.count]
        if self.blocks:
            parts.append(attend_part(query, *self._retrieve(grouped), params))
        if self.local.count >= self.plan.local + self.plan.block:
            self._offload_block()
        return merge(parts, params.sinks)[0]

    def _retrieve(self, grouped: Tensor) -> Rows:
        """Return the rows [Hkv, k block, D] of each KV head's most relevant blocks.

        Args:
            grouped: [Hkv, D], the mean of a KV head's queries.
        """
        count = min(self.plan.slots, len(self.blocks))
        relevance = torch.einsum("hd,hbd->hb", grouped, self.summaries.float())
        chosen = relevance.topk(count, dim=1).indices.tolist()
        for head, selected in enumerate(chosen):
            buffered = self.buffer_ids[head].tolist()
            misses = [block for block in selected if block not in buffered]
            free = [slot for slot, block in enumerate(buffered) if block not in selected]
            for block, slot in zip(misses, free, strict=False):
                for side in (0, 1):
                    self.buffer[side, head, slot] = self.blocks[block][side][head]
                self.buffer_ids[head, slot] = block
            self.needed += count
            self.hits += count - len(misses)
        slots = [[self.buffer_ids[head].tolist().index(block) for block in selected] for head, selected in enumerate(chosen)]
        heads = torch.arange(len(slots))[:, None]
        keys, values = self.buffer[:, heads, torch.tensor(slots)].flatten(2, 3)  # [Hkv, k block, D] each
        return keys, values

    def _offload_block(self) -> None:
        """Make a block of the oldest local tokens."""
        block = self.plan.block
        rows = self.local.keys[:, :block], self.local.values[:, :block]
        age = torch.arange(self.local.count - 1, self.local.count - 1 - block, -1, device=rows[0].device)
        self._summarise(rows[0], self._scores[:, :block], age)
        self.blocks.append((rows[0].clone(), rows[1].clone()))
        self.local = KeptRows(self.local.keys[:, block:], self.local.values[:, block:])
        self._scores = self._scores[:, block:].clone()

    def _summarise(self, keys: Tensor, scores: Tensor, counts: Tensor) -> None:
        """Append the sum of a block's representative keys.

        Args:
            keys: [Hkv, block, D].
            scores: [Hkv, block], summed over the queries that followed each token.
            counts: [block], the number of these queries.
        """
        best = (scores / counts).topk(self.plan.representatives, dim=1).indices  # [Hkv, r]
        summary = take_rows(keys, best).float().sum(1, keepdim=True).to(keys.dtype)
        self.summaries = torch.cat([self.summaries, summary], dim=1)


@dataclass(frozen=True)
class InfLLMMethod(DenseMethod):
    """Sinks, local window and retrieved blocks, all at 16 bits. Other blocks are not attended.

    Differences from the authors' system: every KV head retrieves its own blocks in every step, keys
    stay at their positions (theirs puts all distant tokens at one distance, to go past the longest
    context), and the buffer holds only the last step's blocks.
    """

    name: ClassVar[str] = "infllm"
    summary: ClassVar[str] = "InfLLM-style: local window and the blocks that a step's query asks for"
    needs_all_queries: ClassVar[bool] = True
    block_size: int = field(default=64, metadata={"help": "tokens of a block"})
    representatives: int = field(default=4, metadata={"help": "tokens of a block whose keys decide whether it is retrieved"})
    sinks: int = field(default=4, metadata={"help": "first tokens that are always kept"})
    local_share: float = field(default=0.5, metadata={"help": "part of the budget for the local window; blocks fill the rest"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.local_share < 1:
            raise ConfigError(f"local_share is between 0 and 1, got {self.local_share}.")
        if not 1 <= self.representatives <= self.block_size:
            raise ConfigError(f"representatives is between 1 and block_size ({self.block_size}), got {self.representatives}.")

    def layer(self, prompt: Prefilled, index: int) -> InfLLMLayer:
        plan = self.plan(prompt.length, prompt.rows(index)[0].shape[2])
        return InfLLMLayer(*rows_on_device(prompt, index), prompt.rows(index), prompt.queries(index), plan)

    def plan(self, length: int, dim: int) -> BlockPlan:
        """Return the plan that the budget allows: at least one local token and one block."""
        row = row_bytes(1, dim, ORDINARY_ITEMSIZE)
        summaries = length / self.block_size / 2  # in rows: one key without a value per block
        left = max(0.0, self.budget * length - self.sinks - summaries)
        slots = max(1, int(left * (1 - self.local_share)) // self.block_size)
        rest = left - slots * self.block_size  # too little for another block
        local = int(rest * row / (row + SCORE_BYTES)) - self.block_size
        return BlockPlan(self.sinks, max(1, local), self.block_size, slots, self.representatives)


def representative_scores(query: Tensor, keys: Tensor, span: int) -> Tensor:
    """Return per prompt token the sum of `q . key` over the queries of the next `span` tokens.

    This is InfLLM equation 1, times the span.

    Args:
        query: [Hq, S, D], averaged over the query heads of a KV head.
        keys: [Hkv, S, D].

    Returns:
        float32 [Hkv, S].
    """
    heads, length = keys.shape[:2]
    grouped = query.double().unflatten(0, (heads, -1)).mean(1)  # [Hkv, S, D]
    running = grouped.cumsum(1)
    stop = (torch.arange(length, device=keys.device) + span).clamp(max=length - 1)
    following = running[:, stop] - running  # sum of the queries after each token
    return (following * keys).sum(-1).float()
