"""Room for one more request in the memory that engines and stored prefixes share."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from specache.cache.cache import SpeCache
from specache.cache.sizes import on_disk, page_layout
from specache.config import Policy, SpeCacheConfig
from specache.engine.admission import check_limit, check_room
from specache.engine.auto_tier import FreeMemory, decide_tier, main_memory_bytes, with_margin
from specache.engine.growth import row_block, row_growth, surplus
from specache.engine.handle import Handle, Request
from specache.engine.stored_prefixes import RoomLater, StoredPrefixes, Unwritten
from specache.errors import FastMemoryError, OutOfMemoryError
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import plan
from specache.planning.working_set import FLOAT
from specache.tiers.row_memory import BLOCK_TOKENS

LONGEST_BLOCK_S = 60.0  # seconds that a request waits for stored prefixes to go
LOGIT_BYTES = 64 << 20  # most bytes of the logits of a prompt's chunk, where all are needed


class Tenant(Protocol):
    """An engine, as the room sees it.

    Attributes:
        cache: its cache.
        chunk: the most prompt tokens of a forward pass.
    """

    cache: SpeCache
    chunk: int

    def planned(self) -> list[PlannedSequence]:
        """Return the sequences of the requests that run, with what they still store."""

    def logit_bytes(self) -> int:
        """Return the bytes of the logits of the prompt that is read, which no plan counts."""


class Room:
    """Decides whether a request fits beside everything that the budget and main memory hold.

    Pages that sequences share are held once, and planned once for each. So what is left is computed
    from what is used now, and from what every sequence will hold more than it does.

    Attributes:
        tenants: the engines that share the budget.
        prefixes: stored prefixes, which are dropped as needed, or `None`.
    """

    def __init__(self, model: Any) -> None:
        self.tenants: weakref.WeakSet[Tenant] = weakref.WeakSet()
        self.prefixes: StoredPrefixes | None = None
        self._free = FreeMemory(model)

    def fits(self, tenant: Tenant, handle: Handle, chunk: int) -> bool:
        """Return whether a request fits beside the running ones. Decide the slow tier before.

        If it fits, the stored prefixes that it goes on from are prepared. It waits too for bytes
        that are on their way out, of prefixes that are written to a disk.

        Raises:
            FastMemoryError, OutOfMemoryError, SlowTierError: the request does not fit alone.
        """
        request, reuse, cache = handle.request, handle.reuse, tenant.cache
        new, may_wait = request.planned(), False
        try:
            if reuse is not None:  # before prefixes are dropped to make room
                reuse.prepare(cache, request.token_ids)
                new = reuse.planned(request.token_ids, new)
            may_wait = self._busy or self._may_shrink(handle, cache)  # asked first: bytes may go meanwhile
            if self._has_room(tenant, [*tenant.planned(), *new], chunk, logit_bytes_of(request, cache, chunk)):
                return True
        except RoomLater:
            pass
        except (FastMemoryError, OutOfMemoryError):
            if not may_wait:
                if reuse is not None:
                    reuse.put_back(cache)
                raise
        if reuse is not None:
            reuse.put_back(cache)
        return False

    def check_alone(self, cache: SpeCache, config: SpeCacheConfig, request: Request, chunk: int) -> None:
        """Refuse a request that does not fit into fast memory even alone. Any thread may ask.

        Args:
            cache: any cache over the memory.
            config: the settings that the request will have.
            chunk: the most prompt tokens per forward pass.

        Raises:
            FastMemoryError: names the bytes of every part, and settings that fit.
        """
        limit, planned = cache.resources.budget.limit, request.planned()
        if limit is None:
            return
        chunk = chunk_of(request, chunk, cache)
        more = self._copied_pages(cache, config, len(planned)) + logit_bytes_of(request, cache, chunk)
        check_limit(cache, config, planned, chunk, limit - more)

    def check_smallest(self, cache: SpeCache) -> None:
        """Refuse a limit of fast memory into which no request fits at all.

        Raises:
            FastMemoryError: names the bytes that the smallest one needs.
        """
        if (limit := cache.resources.budget.limit) is None:
            return
        smallest = [PlannedSequence(1, 1)]
        more = self._copied_pages(cache, cache.config, 1)
        needed = plan(cache.resources.dimensions, cache.config, smallest).fast + more
        if needed > limit:
            raise FastMemoryError(
                f"fast_memory allows {limit:,} bytes, and even a request of one token needs {needed:,}: no request would fit. "
                "Raise fast_memory (--fast-memory), or use a smaller top_k, residual or hot_set."
            )

    @contextmanager
    def growth_reserved(self) -> Iterator[None]:
        """Keep stored prefixes from taking bytes inside the block that running requests will need.

        Drop some of them afterwards if what is left is not enough.
        """
        budget = next((one.cache.resources.budget for one in self.tenants), None)
        if self.prefixes is None or budget is None or budget.left is None:
            yield
            return
        growth = sum(self._growth(one) for one in self.tenants)
        with budget.reserved(min(growth, budget.left), "the running requests"):
            yield
        if growth > budget.left:
            self.prefixes.make_room(growth - budget.left, 0, Unwritten.DROP)

    def holds(self, more: int = 0) -> bool:
        """Return whether there is room for all that the running requests will need, and `more`."""
        left = next((one.cache.resources.budget.left for one in self.tenants), None)
        return left is None or sum(self._growth(one) for one in self.tenants) + more <= left

    def more_than_planned(self, cache: SpeCache, tokens: int, stored: int) -> int:
        """Return the bytes that a prompt needs more if its first tokens are stored than else.

        Until it is read, sliding windows are kept as they were before.
        """
        chunk = next((one.chunk for one in self.tenants if one.cache is cache), cache.config.prefill_chunk)
        model, config = cache.resources.dimensions, cache.config.with_changes(prefill_chunk=chunk)
        full, rest = (plan(model, config, [PlannedSequence(tokens, 0, stored=count)]).prefill.total for count in (0, stored))
        return max(0, rest - full)

    def make_room_for_rows(self, cache: SpeCache, sequences: int, tokens: int) -> None:
        """Drop stored prefixes for the rows that a step of so many sequences stores in memory.

        Args:
            tokens: those of the step's chunk of a prompt.
        """
        if self.prefixes is None or on_disk(cache.config) or cache.config.policy is Policy.FULL:
            return
        blocks = sequences + (-(-tokens // BLOCK_TOKENS) + 1 if tokens else 0)  # one that others share is copied
        self.prefixes.make_room_for_rows(blocks * row_block(cache), Unwritten.DROP)

    def detach(self) -> None:
        """Move the state of attached device batches back into their sequences."""
        for one in self.tenants:
            one.cache.release_device_batch()

    def _has_room(self, tenant: Tenant, planned: list[PlannedSequence], chunk: int, more: int) -> bool:
        """Return whether planned sequences fit now, with `more` bytes of fast memory.

        Stored prefixes that are in their way go.

        Raises:
            RoomLater: not before some of them are written.
            FastMemoryError, OutOfMemoryError: not beside what holds bytes now.
        """
        self._free.forget()
        self._free_main_memory(tenant.cache, planned, chunk)
        decide_tier(tenant.cache, planned, chunk, self._free)
        self._check_fast(tenant, planned, chunk, more)
        return self._has_rows(tenant, planned) or not self._busy  # alone it may take more than stored ones may

    def _check_fast(self, tenant: Tenant, planned: list[PlannedSequence], chunk: int, more: int) -> None:
        """Make room of `fast_memory` for the planned sequences and `more` bytes, or raise."""
        cache = tenant.cache
        left = cache.resources.budget.left
        if left is None:
            return
        more += sum(self._growth(one) for one in self.tenants if one is not tenant)
        more += self._copied_pages(cache, cache.config, len(planned)) + surplus(cache, len(planned))
        if self.prefixes is not None:
            needed = plan(cache.resources.dimensions, cache.config.with_changes(prefill_chunk=chunk), planned).fast
            short = needed + more - cache.held_bytes() - left
            if short > 0:
                self.prefixes.make_room(short, 0, Unwritten.QUEUE)
        check_room(cache, planned, chunk, more)

    def _has_rows(self, tenant: Tenant, planned: list[PlannedSequence]) -> bool:
        """Return whether the rows of the planned sequences may be in memory beside all others.

        Stored prefixes make room for them.
        """
        if self.prefixes is None or on_disk(tenant.cache.config):
            return True
        others = sum(row_growth(one.cache, one.planned()) for one in self.tenants if one is not tenant)
        return self.prefixes.make_room_for_rows(others + row_growth(tenant.cache, planned), Unwritten.QUEUE)

    def _free_main_memory(self, cache: SpeCache, planned: list[PlannedSequence], chunk: int) -> None:
        """Drop stored prefixes where main memory would not suffice because of them."""
        if self.prefixes is None or on_disk(cache.config):
            return
        dimensions = cache.resources.dimensions
        memory = plan(dimensions, cache.config.with_changes(prefill_chunk=chunk), planned)
        held = cache.memory().slow + cache.held_bytes()
        needed = with_margin(max(0, main_memory_bytes(dimensions, memory, planned) - held))
        left = self._free.for_bytes(needed)
        if left is not None and needed > left:
            self._free.forget()
            self.prefixes.make_room(0, needed - left, Unwritten.QUEUE)

    @property
    def _busy(self) -> bool:
        return any(one.planned() for one in self.tenants)

    def _may_shrink(self, handle: Handle, cache: SpeCache) -> bool:
        """Return whether others than requests hold bytes, for which it has not waited long yet."""
        held = sum(one.cache.held_bytes() for one in self.tenants)
        if self.prefixes is None or cache.resources.budget.used <= held:
            return False
        now = time.monotonic()
        handle.blocked_s = handle.blocked_s or now
        return now - handle.blocked_s < LONGEST_BLOCK_S

    def _growth(self, tenant: Tenant) -> int:
        """Return the bytes that an engine's running requests will take beyond those they hold."""
        planned = tenant.planned()
        if not planned:
            return 0
        cache = tenant.cache
        config = cache.config.with_changes(prefill_chunk=tenant.chunk)
        needed = plan(cache.resources.dimensions, config, planned).fast
        needed += self._copied_pages(cache, cache.config, len(planned)) + surplus(cache, len(planned))
        return max(0, needed + tenant.logit_bytes() - cache.held_bytes())

    def _copied_pages(self, cache: SpeCache, config: SpeCacheConfig, sequences: int) -> int:
        """Return the bytes of a page per layer and sequence.

        A partly filled page that a stored prefix shares is copied before it is written to.
        """
        if self.prefixes is None or config.policy is Policy.FULL:
            return 0
        layers = cache.resources.dimensions.full_layers
        return sequences * sum(page_layout(config, layer.kv_heads, layer.head_dim).page_bytes for layer in layers)


def chunk_of(request: Request, chunk: int, cache: SpeCache) -> int:
    """Return the prompt tokens per pass of a request: fewer where the logits of each are needed."""
    chunk = request.chunk or chunk
    return chunk if request.on_prompt_logits is None else min(chunk, max(1, LOGIT_BYTES // _logit_bytes(cache, 1)))


def logit_bytes_of(request: Request, cache: SpeCache, chunk: int) -> int:
    """Return the bytes of the logits of a chunk that no plan counts: all but those of one token."""
    return 0 if request.on_prompt_logits is None else _logit_bytes(cache, chunk - 1)


def _logit_bytes(cache: SpeCache, tokens: int) -> int:
    model = cache.resources.dimensions
    return tokens * model.vocabulary * (model.itemsize + 2 * FLOAT)
