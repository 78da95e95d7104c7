"""The cache of a batch: one `Sequence` per prompt; what transformers sees as `past_key_values`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn

from specache.cache.cache_context import CacheContext
from specache.cache.layers import CompressedLayer
from specache.cache.one_call import OneCallAtATime
from specache.cache.resources import Resources
from specache.cache.sequence import Sequence
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.errors import UsageError
from specache.model.dimensions import dimensions_of
from specache.model.identity.adapters import refuse_adapters_per_call
from specache.model.identity.model_state import ModelState
from specache.model.identity.wrappers import unwrapped
from specache.model.info import ModelInfo, inspect_model
from specache.platform import modes
from specache.stats import Counters, MemoryUse, report
from specache.tiers.base import SlowTier
from specache.tiers.disk.scratch import prepare_folder
from specache.tiers.tier_choice import TierChoice

_OTHER_MODEL = (
    "This SpeCache was filled by another model{what}. Its keys and values mean nothing to this one. Continue with the model it was "
    "made for, or start a new SpeCache(model, config)."
)
_CHANGED_MODEL = (
    "The model changed since it filled this SpeCache{what}. Its keys and values mean nothing to what it computes now. Change it "
    "back, or start a new SpeCache(model, config)."
)


class SpeCache:
    """The key-value cache of a batch of sequences: all rows at 16 bits in slow memory, a low-bit copy in fast memory.

    Hand it on as `past_key_values` to `specache.generate` (or to `model.generate` with `custom_generate=specache.decode`) to
    continue a conversation; `reset` begins another text. `model()` and stock `generate()` cannot use it and raise.

    One call at a time uses it, in the process that made it: another thread is refused, and should have a cache of its own.
    `copy.deepcopy(cache)` is `cache.fork()`. A cache that nothing refers to is freed at once.

    Args:
        model: a transformers model for text generation, wrapped (torch.compile, DataParallel, peft) or not.
        config: settings; `None` takes the defaults. `cache.config` has every `auto` decided; of `slow_tier="auto"` it says what is
            taken where memory suffices until the first prompt is there, which decides it (`specache.engine.auto_tier`).

    Attributes:
        tier_choice: what `slow_tier="auto"` took last and why; `None` before that and for every other tier.
        on_disk_chosen: called when `auto` takes the disk. `None` warns.

    Raises:
        UnsupportedModelError: the model's attention cannot run over a low-bit copy.
        UsageError: `config` is of another type.
        ConfigError: settings that this model or device does not allow.
        SlowTierError: the folder of `slow_tier='disk:...'` cannot be written.
    """

    one_sequence = False  # whether it belongs to a session, which holds no batch

    def __init__(self, model: Any, config: SpeCacheConfig | None = None) -> None:
        model = unwrapped(model)
        info = inspect_model(model)
        if not isinstance(config, SpeCacheConfig | None):
            raise UsageError(f"config must be a specache.SpeCacheConfig, not a value of type {type(config).__name__}.")
        asked = config or SpeCacheConfig()
        config = asked.resolved(info.device.type)
        if config.slow_dir is not None:
            prepare_folder(config.slow_dir)  # what is wrong with it shows before a prompt is prefilled
        context = CacheContext(info, config, Resources(model, info, config))
        self._begin(context, weakref.ref(model), asked)

    def _begin(self, context: CacheContext, model: Callable[[], Any], asked: SpeCacheConfig) -> None:
        self._context = context
        self._model = model
        self._state: ModelState | None = None  # the model as it was when it filled the sequences
        self.asked = asked  # with what is `auto` still so
        self._tier_is_fixed = False  # a fork of a cache that holds rows keeps them where they are
        self.tier_choice: TierChoice | None = None
        self.on_disk_chosen: Callable[[TierChoice], None] | None = None
        self.in_use = OneCallAtATime()
        self.sequences: list[Sequence] = []
        # gives back what a batch on the device holds of the sequences' state
        self.detach_device_batch: Callable[[], None] | None = None

    @property
    def info(self) -> ModelInfo:
        return self._context.info

    @property
    def config(self) -> SpeCacheConfig:
        return self._context.config

    @property
    def resources(self) -> Resources:
        return self._context.resources

    @property
    def counters(self) -> Counters:
        return self._context.counters

    @property
    def expected_sequences(self) -> int:
        """Of the batch that is being prefilled."""
        return self._context.expected_sequences

    @expected_sequences.setter
    def expected_sequences(self, count: int) -> None:
        self._context.expected_sequences = count

    @property
    def decides_tier(self) -> bool:
        """Whether `slow_tier="auto"` may still take another tier: not once it is the disk, nor in a fork of what is
        stored, nor where the policy has no rows.
        """
        now = self.config
        decided = self._tier_is_fixed or now.slow_tier is SlowTierKind.DISK or now.policy is Policy.FULL
        return self.asked.slow_tier is SlowTierKind.AUTO and not decided

    def has_config(self, config: SpeCacheConfig) -> bool:
        """Whether `config` asks for what this cache has."""
        device = self.info.device.type
        return config.resolved(device) in (self.config, self.asked.resolved(device))

    def choose_tier(self, choice: TierChoice) -> None:
        """Take the tier that was chosen for what comes next, and move what is stored there.

        Raises:
            SlowTierError: the rows cannot be written; nothing changed.
            FastMemoryError: what a disk tier needs more of fast memory is not allowed; nothing changed.
        """
        if choice.slow_tier is not self.config.slow_tier:
            changed = replace(self.asked, slow_tier=choice.slow_tier, slow_dir=choice.slow_dir)
            self._move_rows(changed.resolved(self.info.device.type))
            self._context.count_anew()
        self.tier_choice = choice
        if choice.on_disk:
            self._tell(choice)

    def check_model(self, model: Any) -> None:
        """Refuse to continue with anything that computes otherwise than what filled the cache: another model, or the same one with
        other weights, adapters or settings.

        Raises:
            UsageError: the message says what differs.
        """
        model = unwrapped(model)
        refuse_adapters_per_call(model)
        if self.get_seq_length() == 0:
            self._check_dimensions(model)
        elif self._state is None:
            if self._model() is not model:
                raise UsageError(_OTHER_MODEL.format(what=""))
        elif difference := self._state.difference(model):
            raise UsageError((_CHANGED_MODEL if self._state.is_of(model) else _OTHER_MODEL).format(what=f": {difference}"))
        self._model = weakref.ref(model)

    @contextmanager
    def filled_by(self, model: Any) -> Iterator[None]:
        """Remember, while a model runs over this cache, what it computes with: `check_model` compares with it."""
        if self._state is None or self.get_seq_length() == 0:
            self.begin(model)
        try:
            yield
        finally:
            if self._state is not None:
                self._state = self._state.after_run(model)

    def begin(self, model: Any) -> None:
        """Take what a model computes with now as what fills the empty cache."""
        self.remember(model)

    def remember(self, model: Any) -> None:
        """Take what a model computes with now as what the sequences are made by."""
        self._state = ModelState.of(model)

    def _check_dimensions(self, model: Any) -> None:
        """Refuse a model for whose sizes, dtype or device an empty cache was not made."""
        info = inspect_model(model)
        same = replace(info, fingerprint=self.info.fingerprint) == self.info
        if not same or dimensions_of(model, info).layers != self.resources.dimensions.layers:
            raise UsageError(
                "This SpeCache was made for another model, or the model's dtype, device or dimensions changed since. Start a new "
                "SpeCache(model, config)."
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored, of the longest sequence."""
        return max((sequence.length for sequence in self.sequences), default=0)

    @property
    def finish_reasons(self) -> list[str | None]:
        """Why each sequence's last generation ended: `stop`, `length`, `interrupted`, `error`, or `None` before one did."""
        return [sequence.finish_reason for sequence in self.sequences]

    def release_device_batch(self) -> None:
        """Have the sequences hold their whole state themselves, also where a batch decodes on the device."""
        if self.detach_device_batch is not None:
            self.detach_device_batch()

    def stats(self) -> dict[str, Any]:
        """What happened so far, JSON-ready; keys in `specache.stats.report`, and `slow_tier` with what `auto` chose and why.

        Any thread may ask, also while another generates.
        """
        if not self.in_use.elsewhere:
            self.release_device_batch()
        choice = None if self.tier_choice is None else self.tier_choice.to_dict()
        tier = {"slow_tier": str(self.config.slow_tier), "slow_tier_choice": choice}
        return {**report(self.memory(), self.counters, self.resources.budget.peak), **tier}

    def held_bytes(self) -> int:
        """Fast memory that this cache's sequences hold of the budget, shared pages counted once per sequence."""
        return sum(sequence.held_bytes() for sequence in self.sequences)

    def memory(self) -> MemoryUse:
        """Bytes held now, counted from the tensors."""
        total = MemoryUse()
        for use in (sequence.memory() for sequence in self.sequences):
            for name, value in vars(use).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def fork(self, policy: Policy | str | None = None, **changes: Any) -> SpeCache:
        """An independent copy of the state, optionally under other settings: shares the prefill.

        Settings that the low-bit copy depends on (`code`, `bits`, `group_size`, `residual`) make it anew from the 16-bit rows;
        without them its pages are shared. The rotated code's key weights stay those of the original, made from its first
        `residual + group_size` tokens: their queries are kept no longer than that.

        Raises:
            UsageError: another slow tier, or `full` back to a low-bit policy.
        """
        if policy is not None:
            changes["policy"] = policy
        if "slow_tier" in changes or "slow_dir" in changes:
            raise UsageError("A fork keeps slow_tier: its rows lie there. Prefill a new SpeCache.")
        config = replace(self.config, **changes).resolved(self.info.device.type)
        if self.config.policy is Policy.FULL and config.policy is not Policy.FULL:
            raise UsageError("A cache with policy 'full' has no low-bit copy; prefill a new SpeCache with the other policy.")
        with self.in_use.by("fork"), modes.ours():
            self.release_device_batch()
            other = object.__new__(SpeCache)
            other._begin(self._context.fork(config), self._model, replace(self.asked, **changes))
            other._tier_is_fixed = bool(self.sequences)
            other.tier_choice, other.on_disk_chosen = self.tier_choice, self.on_disk_chosen
            other.counters.prefill_s = self.counters.prefill_s
            other._state = self._state
            other.sequences = [sequence.fork(other.context) for sequence in self.sequences]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> SpeCache:
        """`fork()`, as transformers' own caches are copied to use a prefilled prompt again."""
        memo[id(self)] = other = self.fork()
        return other

    def __copy__(self) -> SpeCache:
        """`fork()` too: two caches over the same sequences would spoil each other."""
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "A SpeCache cannot be pickled: its 16-bit pairs, threads and files belong to this process. To keep its state or to "
            "continue it in another process use a session (specache.Session); to copy it here use cache.fork()."
        )

    @property
    def context(self) -> CacheContext:
        """What its sequences need of it."""
        return self._context

    def new_sequence(self) -> Sequence:
        return Sequence(self._context)

    def repeat(self, sequence: Sequence) -> Sequence:
        """Return another sequence with the state of one of this cache's (equal prompts are prefilled once)."""
        self.release_device_batch()
        return sequence.fork(self._context)

    def reset(self) -> None:
        """Forget every token and begin anew, with the same model and settings: what is generated next is another text.

        Raises:
            UsageError: a call is using it; nothing changed.
        """
        with self.in_use.by("reset"):
            self.release_device_batch()
            for sequence in self.sequences:
                sequence.clear()
                sequence.finish_reason = None
            if not self.one_sequence:
                self.sequences = []
            self._context.count_from_zero()

    def close(self) -> None:
        """End background work and free everything, also where a part of that fails.

        Raises:
            UsageError: a call is using it; nothing changed.
        """
        if self.in_use.forked:
            return self._forget()
        with self.in_use.by("close"):
            self.free()

    def free(self) -> None:
        """`close` for the call that is using it."""
        sequences, self.sequences = self.sequences, []
        with ExitStack() as stack:  # the worker comes last
            stack.callback(self._context.end_worker)
            for sequence in sequences:
                stack.callback(sequence.clear)
            stack.callback(self.release_device_batch)

    def _forget(self) -> None:
        """In a process that was forked: threads and files are its parent's, and only the memory is given back."""
        self.sequences, self.detach_device_batch = [], None
        self._context.forget_worker()

    def __enter__(self) -> SpeCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _move_rows(self, config: SpeCacheConfig) -> None:
        """Go on under `config`, which has another slow tier; what is stored is written there first. A failure changes nothing."""
        self.release_device_batch()
        context = self._context
        before, tiers = context.config, list[SlowTier]()
        try:
            context.config = config
            for sequence in self.sequences:
                sequence.count_buffers()
                tiers.append(context.new_tier())
                sequence.copy_rows(tiers[-1])
        except BaseException:
            context.config = before
            for tier in tiers:
                tier.close()
            for sequence in self.sequences:
                sequence.count_buffers()
            raise
        context.end_worker()  # a disk has more threads
        for sequence, tier in zip(self.sequences, tiers, strict=True):
            sequence.use_tier(tier)

    def _tell(self, choice: TierChoice) -> None:
        """Say that the rows go to disk, which is slower, once."""
        if self.on_disk_chosen is not None:
            return self.on_disk_chosen(choice)
        warnings.warn(
            f"slow_tier='auto' keeps the 16-bit pairs on disk, in {choice.slow_dir}: {choice.reason}. Name a tier to decide that "
            "yourself (slow_tier='ram-inplace').",
            RuntimeWarning,
            stacklevel=2,
        )

    def hot_slots(self, sequence: Sequence, layer: CompressedLayer) -> int:
        """Slots per KV head that the hot set's budget gives a layer."""
        return self._context.hot_slots(sequence.length, layer)

    # What transformers would ask of a cache of its own

    is_compileable = False

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_stock_call()

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_stock_call()

    def get_query_offset(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_stock_call()

    def get_max_cache_shape(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_stock_call()

    def reorder_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_stock_call()


def _refuse_stock_call() -> NoReturn:
    raise UsageError(
        "A SpeCache cannot be used by model(...) or by generate() alone. Call specache.generate(model, ..., "
        "past_key_values=cache), or model.generate(..., custom_generate=specache.decode, past_key_values=cache)."
    )
