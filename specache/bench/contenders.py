"""Decode a workload step by step: with SpeCache, transformers' caches, or the bare model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from specache.bench.breakdown import recorded
from specache.bench.compute_device import CUDA
from specache.bench.greedy import GreedySteps
from specache.bench.synthetic import add_sequence
from specache.bench.timing import PhaseClock
from specache.bench.workload import Workload
from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence
from specache.config import SpeCacheConfig
from specache.engine.attention_hook import attached, decode_forward, reset_rope
from specache.engine.compiled_layers import BlankPass
from specache.engine.traced import traced_layers
from specache.errors import ConfigError
from specache.linear import cpu_linear
from specache.model.quantized_cache import PACKAGES, new_quantized_cache, quantised_tokens, store_prompt
from specache.planning.traffic import step_traffic

_IMPORTED_AS = {"hqq": "hqq", "quanto": "optimum"}


class Contender(ABC):
    """One implementation over one workload.

    Attributes:
        impl: its name in the results: `specache`, `dynamic`, `quantized`, ...
        cache: what its cache holds, in words.
        needed_bytes: memory beside the model, where it computes.
        host_bytes: main memory besides, where the model computes on a GPU.
        read_bytes: bytes that a step reads at least once: all weights that a token needs, and of
            the cache what attention goes over; None if unknown. 16-bit pairs that a step selects
            do not count.
    """

    impl: str
    cache: str
    needed_bytes: int
    host_bytes: int = 0
    read_bytes: int | None = None

    @abstractmethod
    def prepare(self) -> None:
        """Fill the cache."""

    @abstractmethod
    def step(self) -> None:
        """Decode one token of every sequence."""

    @abstractmethod
    def close(self) -> None:
        """Free everything."""

    def ready(self) -> AbstractContextManager[None]:
        """Entered around steps; its own time does not count."""
        return nullcontext()

    def phases(self, steps: int, before: Callable[[], object] = lambda: None) -> dict[str, float] | None:
        """Run `steps` more steps and return their milliseconds in score, select, fetch and attend.

        `None` where a step has no such phases.

        Args:
            before: called before every step.
        """
        return None


class SpeCacheContender(Contender):
    """Ours.

    Args:
        config: bits, code, policy and so on.
        shares_rows: whether all sequences read the 16-bit rows of the first one.
    """

    impl = "specache"

    def __init__(self, work: Workload, config: SpeCacheConfig, shares_rows: bool = False) -> None:
        self.work = work
        self._shares_rows = shares_rows
        self.config = config.resolved(work.info.device.type)
        pairs = config.selection.most(config.low_bit_length(work.context))
        self.cache = f"{config.bits}-bit {config.code}, k = {pairs}, {self.config.policy}"
        self.needed_bytes = work.copy_bytes(config)
        if work.info.device.type == CUDA:
            self.host_bytes = work.exact_bytes
        else:
            self.needed_bytes += work.exact_bytes
        traffic = step_traffic(work.dimensions, self.config, work.context, work.batch)
        self.read_bytes = traffic.weights + traffic.scan + traffic.recent
        self._held: SpeCache | None = None

    def prepare(self) -> None:
        work = self.work
        self._held = SpeCache(work.model, self.config)
        for _ in range(work.batch):
            like = next(iter(self._held.sequences), None)
            add_sequence(self._held, {i: work.rows(i) for i in range(len(work.layer_shapes))}, like, self._shares_rows)
            self.filled(self._held.sequences[-1])
        self._steps = GreedySteps(work.model, self._held, [0] * work.batch, [0] * work.batch)

    @property
    def held(self) -> SpeCache:
        """The cache, from `prepare` to `close`."""
        assert self._held is not None, "prepared"
        return self._held

    @property
    def tokens(self) -> list[int]:
        """What the last step decoded, per sequence."""
        return self._steps.tokens

    @property
    def out_of_room(self) -> bool:
        """Whether a step had no room for its static buffers and went on without."""
        return self._steps.out_of_room

    def filled(self, sequence: Sequence) -> None:
        """A sequence holds its tokens; called before the next one is filled."""

    def step(self) -> None:
        self._steps.step()

    def close(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def ready(self) -> AbstractContextManager[None]:
        return self._steps.attached()

    def phases(self, steps: int, before: Callable[[], object] = lambda: None) -> dict[str, float]:
        clock = PhaseClock()
        with self.ready(), recorded(clock):
            for _ in range(steps):
                before()
                clock.begin_step()
                self.step()
        return clock.medians(steps)


class StockContender(Contender):
    """The stock model with a cache of transformers.

    Attributes:
        held: the cache, from `prepare` to `close`.
        tokens: what the last step decoded, int64 [B, 1].
    """

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.held: Any = None

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty cache."""

    def store(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Put the rows [B, Hkv, S, D] of a layer into the cache."""
        self.held.update(keys, values, index)

    def prepare(self) -> None:
        work = self.work
        self.held = self.new_cache()
        for index in range(len(work.layer_shapes)):
            keys, values = (rows.expand(work.batch, *rows.shape) for rows in work.rows(index))  # [B, Hkv, S, D]
            self.store(index, keys, values)
        self._length = work.context
        self.tokens = torch.zeros(work.batch, 1, dtype=torch.long, device=work.info.device)

    def step(self) -> None:
        model = self.work.model
        reset_rope(model, self.work.info)
        positions = torch.full_like(self.tokens, self._length)
        with torch.no_grad():
            output = model(self.tokens, position_ids=positions, past_key_values=self.held, use_cache=True, logits_to_keep=1)
        self._length += 1
        self.tokens = output.logits[:, -1:].argmax(-1)  # [B, 1]

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.held.layers)

    def close(self) -> None:
        self.held = None


@contextmanager
def our_products(model: Any) -> Iterator[None]:
    """Have the model's linear layers on the CPU compute as within `specache.generate`."""
    changed = cpu_linear.install(model)
    try:
        yield
    finally:
        cpu_linear.remove(changed)


class DynamicContender(StockContender):
    """transformers' ordinary cache.

    Args:
        ours: with our products of linear layers (`specache.linear.cpu_linear`) in place of
            PyTorch's. Quantised layers have products of their own in both.
    """

    impl = "dynamic"

    def __init__(self, work: Workload, ours: bool = False) -> None:
        super().__init__(work)
        self._ours = ours
        self.impl = "dynamic-ours" if ours else type(self).impl
        self.read_bytes = work.dimensions.read_bytes + work.exact_bytes
        self.cache = str(work.info.dtype).removeprefix("torch.")
        self.needed_bytes = work.exact_bytes + work.exact_bytes // len(work.layer_shapes)  # a layer is copied to grow

    def new_cache(self) -> Any:
        return DynamicCache(config=self.work.model.config)

    def ready(self) -> AbstractContextManager[None]:
        return our_products(self.work.model) if self._ours else nullcontext()


class QuantizedContender(StockContender):
    """transformers' quantised cache, with a library that is installed.

    Raises:
        ConfigError: there is none, or it cannot hold these sequences.
    """

    impl = "quantized"

    def __init__(self, work: Workload, bits: int) -> None:
        super().__init__(work)
        self._bits = bits
        self._backend = quantized_backend()
        self.cache = f"{bits}-bit {self._backend}"
        self.needed_bytes = work.exact_bytes * (bits + 1) // 16 + 3 * work.exact_bytes // len(work.layer_shapes)
        for layer, (heads, dim) in zip(
            self.new_cache().layers, work.layer_shapes, strict=True
        ):  # what it cannot hold is refused here
            quantised_tokens(layer, work.context, work.batch * heads * dim)

    def new_cache(self) -> Any:
        try:
            return new_quantized_cache(self.work.model, self._backend, self._bits, q_group_size=64, residual_length=128)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"transformers' QuantizedCache with {self._backend} cannot run this: {error}") from error

    def store(self, index: int, keys: Tensor, values: Tensor) -> None:
        store_prompt(self.held, index, keys, values)


class BareModel(Contender):
    """A forward pass without any cache: what is left of a step is reading the weights.

    Args:
        rows: tokens per sequence: 2 where a draft token is decoded beside the real one.
        ours: with the layers of our steps (`specache.engine.traced`), whose attention is zero.
        products: with our products of linear layers (see `DynamicContender`).
    """

    impl = "weights"
    cache = "none"
    needed_bytes = 0

    def __init__(self, work: Workload, rows: int, ours: bool = False, products: bool = False) -> None:
        self.work = work
        self.rows = rows
        self._ours = ours
        self._products = products
        self.read_bytes = work.dimensions.read_bytes
        self._ids = torch.zeros(work.batch, rows, dtype=torch.long, device=work.info.device)
        self._positions = self._ids + torch.arange(rows, device=work.info.device)
        self._layers: traced_layers.TracedAnswer | None = None

    def prepare(self) -> None:
        if self._ours:
            with attached(self.work.model):
                self._layers = traced_layers.begin_answer(self.work.model)

    def step(self) -> None:
        model = self.work.model
        with torch.no_grad():
            if self._ours:
                decode_forward(model, self._ids, self._positions, BlankPass(), layers=self._layers)
            else:
                model(self._ids, use_cache=False, logits_to_keep=self.rows)

    def ready(self) -> AbstractContextManager[None]:
        if self._ours:
            return attached(self.work.model)
        return our_products(self.work.model) if self._products else nullcontext()

    def close(self) -> None:
        self._layers = None


def quantized_backend() -> str:
    """The library that transformers' quantised cache can use here.

    Raises:
        ConfigError: none is installed.
    """
    for backend in PACKAGES:
        if find_spec(_IMPORTED_AS[backend]) is not None:
            return backend
    raise ConfigError(f"transformers' QuantizedCache needs {' or '.join(PACKAGES.values())}: pip install hqq")
