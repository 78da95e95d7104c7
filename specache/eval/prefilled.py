"""One prompt, prefilled once with exact attention, from which every method starts."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from specache.cache.cache import SpeCache
from specache.cache.window_layer import WindowLayer
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.engine.attention_hook import attached
from specache.engine.chunked_prefill import OnLogits, Progress, last_of
from specache.engine.decoder import Decoder
from specache.kernels.types import AttentionParams

OBSERVATION_WINDOW = 64  # newest prompt tokens whose queries are kept for every method
READ_ON = 256  # tokens of a chunk of `read_on`, whose logits are held: 270 MB for 262,144 tokens


class Prefilled:
    """All 16-bit rows of a prompt, the logits after it, and the queries that some methods look at.

    Args:
        model: a transformers model.
        token_ids: the prompt.
        all_queries: keep the queries of every token, not only of the newest ones.
        like: where the prompt begins with the whole of another prefilled one, start from that.

    Attributes:
        token_ids: the prompt, `S` tokens.
        cache: a SpeCache over tier `ram` that holds the prompt. Methods fork it or read its rows,
            and never change it.
        logits: float32 [V] after the last token.
        params: layer -> scaling, softcap and sinks of every full-attention layer.
    """

    def __init__(
        self,
        model: Any,
        token_ids: list[int],
        *,
        all_queries: bool = False,
        like: Prefilled | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self.model = model
        self.token_ids = list(token_ids)
        self.params: dict[int, AttentionParams] = {} if like is None else dict(like.params)
        self._window = None if all_queries else OBSERVATION_WINDOW
        self._queries: dict[int, list[Tensor]] = defaultdict(list)
        if like is None:
            self.cache = SpeCache(model, SpeCacheConfig(slow_tier=SlowTierKind.RAM, policy=Policy.VERIFIED))
            self.cache.sequences.append(self.cache.new_sequence())
        else:
            self.cache = like.cache.fork()
            for layer, parts in like._queries.items():
                self._queries[layer] = list(parts)
        with torch.no_grad(), attached(model):
            decoder = Decoder(model, self.cache)
            chunk = self.cache.config.prefill_chunk
            self.logits = decoder.prefill(self.cache.sequences[0], self.token_ids, chunk, progress, self._observe)

    @property
    def length(self) -> int:
        """`S`, tokens in the prompt."""
        return len(self.token_ids)

    @property
    def reads_on_in_chunks(self) -> bool:
        """Return whether `read_on` computes what decoding token by token does, in float32.

        It does not where a pass's numbers depend on how many tokens it has: in 16 bits, with RoPE
        that changes with the length, and where rows share the scales of activations.
        """
        info = self.cache.info
        return info.dtype is torch.float32 and info.rope_switch is None and not info.couples_rows

    def read_on(self, token_ids: list[int], on_logits: OnLogits) -> None:
        """Read more tokens with exact attention, in chunks, and forget them.

        Args:
            on_logits: called with the number of a chunk's first token, from 0 on, and the logits
                [n, V] after its tokens.
        """
        fork = self.cache.fork()
        try:
            decoder = Decoder(self.model, fork)
            whole = [*self.token_ids, *token_ids]
            with attached(self.model):
                last_of(
                    decoder.prefill_chunks(
                        fork.sequences[0],
                        whole,
                        READ_ON,
                        lambda done, total: None,
                        on_logits=lambda first, logits: on_logits(first - self.length, logits),
                    )
                )
        finally:
            fork.close()

    @property
    def full_layers(self) -> list[int]:
        """Numbers of the full-attention layers: the ones whose cache grows."""
        return [index for index, window in enumerate(self.cache.info.windows) if window is None]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in an ordinary 16-bit cache of these layers."""
        return self.cache.memory().full // self.length

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys (after RoPE) and values [Hkv, S, D]. Do not write to them."""
        return self.cache.sequences[0].tier.read(layer, 0, self.length)

    def queries(self, layer: int) -> Tensor:
        """Return queries [Hq, m, D] of the newest `m` tokens (all `S` with `all_queries`)."""
        return torch.cat(self._queries[layer], dim=1)

    def windows(self) -> dict[int, WindowLayer]:
        """Copies of the sliding layers' state, for a session of its own."""
        return self.cache.sequences[0].windows()

    def close(self) -> None:
        """Free everything."""
        self.cache.close()
        self._queries.clear()

    def _observe(self, layer: int, query: Tensor, params: AttentionParams) -> None:
        self.params[layer] = params
        parts = self._queries[layer]
        parts.append(query.detach().clone())
        if self._window is not None:
            parts[:] = [torch.cat(parts, dim=1)[:, -self._window :]]
