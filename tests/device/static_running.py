"""Static steps on the CPU, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import specache
from specache.cache import resources
from specache.device.batch import DeviceBatch
from specache.engine import static_decoder
from specache.engine.static_decoder import StaticDecoder, StaticSettings
from specache.linear import native_products
from specache.tiers.row_memory import RowMemory
from specache.tiers.streams import InlineStreams
from tests.tiny import ragged


@contextmanager
def static_steps(monkeypatch: Any, **changes: Any) -> Iterator[list[int]]:
    """Decode steps on the CPU run over static buffers -> grows by the number of sequences of every
    static step.
    """
    settings = {"streams": lambda device: InlineStreams(), "graphs": lambda device: None, "capacity_step": 64, "devices": ("cpu",)}
    settings.update(changes)
    steps: list[int] = []
    run = StaticDecoder._run

    def counted(self: StaticDecoder, batch: DeviceBatch, tokens: list[list[int]]) -> torch.Tensor:
        logits = run(self, batch, tokens)
        steps.append(len(tokens))
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(static_decoder, "SETTINGS", StaticSettings(**settings))
        patch.setattr(resources, "RowMemory", partial(RowMemory, block_tokens=None))  # a GPU reads rows in one block
        patch.setattr(native_products, "instruction_set", lambda: None)  # a GPU has products of its own, which graphs record
        patch.setattr(StaticDecoder, "_run", counted)
        yield steps


def config(**changes: Any) -> specache.SpeCacheConfig:
    defaults = {"slow_tier": "ram", "policy": "verified", "group_size": 16, "residual": 16, "top_k": 8, "hot_set": 0.1}
    return specache.SpeCacheConfig(**{**defaults, **changes})


def answer(model: Any, settings: specache.SpeCacheConfig, lengths: tuple[int, ...], new: int, **arguments: Any) -> Any:
    """Greedy tokens and logits of a ragged batch, and the cache."""
    ids, mask = ragged(*lengths)
    return _generate(model, ids, mask, new, config=settings, **arguments)


def continued(
    model: Any,
    cache: specache.SpeCache,
    ids: torch.Tensor,
    lengths: tuple[int, ...],
    new: int,
    before_token: Callable[[], None] = lambda: None,
) -> Any:
    """The same with a cache, from `ids` [B, width + what was generated] on; `before_token` is
    called before a token is chosen.
    """

    def listen(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        before_token()
        return scores

    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return _generate(model, ids, mask, new, past_key_values=cache, logits_processor=[listen])


def _generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, new: int, **arguments: Any) -> Any:
    fixed = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return specache.generate(model, ids, attention_mask=mask, **fixed, **arguments)


def assert_equal(static: Any, eager: Any, limit: float = 1e-5) -> None:
    """Same tokens, logits within `limit` of one another in parts of the largest."""
    assert torch.equal(static.sequences, eager.sequences)
    ours, theirs = torch.stack(static.logits), torch.stack(eager.logits)
    assert (ours - theirs).abs().max() <= limit * theirs.abs().max()
