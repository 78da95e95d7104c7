"""The cache of a batch, one `Sequence` per prompt. Transformers gets it as `past_key_values`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn

from specache.cache.cache_context import CacheContext
from specache.cache.one_call import OneCallAtATime
from specache.cache.resources import Resources
from specache.cache.sequence import Sequence
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.errors import UsageError
from specache.model.dimensions import dimensions_of
from specache.model.identity.adapters import refuse_adapters_per_call
from specache.model.identity.model_state import ModelState
from specache.model.identity.wrappers import unwrapped
from specache.model.info import ModelInfo, check_one_gpu, inspect_model
from specache.platform import modes
from specache.stats import Counters, MemoryUse, report
from specache.tiers.base import SlowTier
from specache.tiers.disk.scratch import prepare_folder
from specache.tiers.ram import held_bytes
from specache.tiers.tier_choice import TierChoice

_OTHER_MODEL = (
    "This SpeCache was filled by another model{what}. Its keys and values mean nothing to this one. Continue with the model it was "
    "made for, or start a new SpeCache(model, config)."
)
_CHANGED_MODEL = (
    "The model changed since it filled this SpeCache{what}. Its keys and values mean nothing to what it computes now. Change it "
    "back, or start a new SpeCache(model, config)."
)
_STOCK = (
    "A SpeCache cannot be used by model(...) or by generate() alone. Call specache.generate(model, ..., past_key_values=cache), or "
    "model.generate(..., custom_generate=specache.decode, past_key_values=cache)."
)
_SHORTEN = "To shorten it, pass the shorter text to specache.generate or specache.prefill: what follows it is forgotten."
_OTHER_CODE = (
    "Since the model filled this SpeCache, {what}. If that changes what the model computes, as steering does, the stored keys and "
    "values do not belong to it: undo it, or start a new SpeCache(model, config). If it only records, nothing has to be done."
)


class SpeCache:
    """The key-value cache of a batch: 16-bit pairs in slow memory, a low-bit copy in fast memory.

    Pass it as `past_key_values` to `specache.generate` (or to `model.generate` with
    `custom_generate=specache.decode`) to continue a conversation; `reset` begins another text.
    `model()` and stock `generate()` cannot use it and raise.

    One call at a time uses it, in the process that made it. A call from another thread is refused;
    give each thread its own cache. `copy.deepcopy(cache)` is `cache.fork()`. A cache is freed as
    soon as nothing refers to it.

    Args:
        model: a transformers model for text generation. torch.compile, DataParallel and peft may
            wrap it.
        config: settings; `None` takes the defaults. In `cache.config` every `auto` is resolved.
            `slow_tier="auto"` resolves to main memory until the first prefill chooses
            (`specache.engine.auto_tier`).

    Attributes:
        context: the part of the cache that its sequences use.
        tier_choice: the last choice of `slow_tier="auto"` and its reason; `None` before the first
            choice and for every other tier.
        on_disk_chosen: called when `auto` chooses the disk. `None` raises a warning instead.

    Raises:
        UnsupportedModelError: the model's attention cannot run over a low-bit copy, or its weights
            are on several GPUs.
        UsageError: `config` has a wrong type.
        ConfigError: this model or device does not support the settings.
        SlowTierError: the folder of `slow_tier='disk:...'` cannot be written.
    """

    one_sequence = False  # True for the cache of a session, which holds no batch

    def __init__(self, model: Any, config: SpeCacheConfig | None = None) -> None:
        model = unwrapped(model)
        info = inspect_model(model)
        if not isinstance(config, SpeCacheConfig | None):
            raise UsageError(f"config must be a specache.SpeCacheConfig, not a value of type {type(config).__name__}.")
        asked = config or SpeCacheConfig()
        config = asked.resolved(info.device.type)
        if config.policy is not Policy.FULL:
            check_one_gpu(model)
        if config.slow_dir is not None:
            prepare_folder(config.slow_dir)  # an unusable folder is reported before the prefill
        context = CacheContext(info, config, Resources(model, info, config))
        self._begin(context, weakref.ref(model), asked)

    def _begin(self, context: CacheContext, model: Callable[[], Any], asked: SpeCacheConfig) -> None:
        self.context = context
        self._model = model
        self._state: ModelState | None = None  # the model's state when it filled the sequences
        self.asked = asked  # the user's settings, with every `auto` unresolved
        self._tier_is_fixed = False  # True for a fork of a cache with rows: it keeps their tier
        self.tier_choice: TierChoice | None = None
        self.on_disk_chosen: Callable[[TierChoice], None] | None = None
        self.in_use = OneCallAtATime()
        self.sequences: list[Sequence] = []
        # moves the state of the attached device batch back into the sequences
        self.detach_device_batch: Callable[[], None] | None = None

    @property
    def info(self) -> ModelInfo:
        return self.context.info

    @property
    def config(self) -> SpeCacheConfig:
        return self.context.config

    @property
    def resources(self) -> Resources:
        return self.context.resources

    @property
    def counters(self) -> Counters:
        return self.context.counters

    @property
    def decides_tier(self) -> bool:
        """Return whether `slow_tier="auto"` may still choose another tier.

        The choice is final once it is the disk, in a fork of stored rows, and for policy `full`.
        """
        now = self.config
        decided = self._tier_is_fixed or now.slow_tier is SlowTierKind.DISK or now.policy is Policy.FULL
        return self.asked.slow_tier is SlowTierKind.AUTO and not decided

    def has_config(self, config: SpeCacheConfig) -> bool:
        """Return whether `config` resolves to this cache's settings."""
        device = self.info.device.type
        return config.resolved(device) in (self.config, self.asked.resolved(device))

    def choose_tier(self, choice: TierChoice) -> None:
        """Use the chosen tier from now on, and move the stored rows to it.

        Raises:
            SlowTierError: the rows cannot be written; nothing changed.
            FastMemoryError: `fast_memory` does not allow the disk tier's buffers; nothing changed.
        """
        if choice.slow_tier is not self.config.slow_tier:
            changed = self.asked.with_changes(slow_tier=choice.slow_tier, slow_dir=choice.slow_dir)
            self._move_rows(changed.resolved(self.info.device.type))
            self.context.count_anew()
        self.tier_choice = choice
        if choice.on_disk:
            self._report_disk(choice)

    def check_model(self, model: Any) -> None:
        """Refuse a model other than the one that filled the cache, or changed since.

        Weights, adapters and settings count. Of hooks and replaced forwards a warning is given:
        they may only record.

        Raises:
            UsageError: names the difference.
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
        elif difference := self._state.difference_of_code(model):
            warnings.warn(_OTHER_CODE.format(what=difference), UserWarning, stacklevel=2)
        self._model = weakref.ref(model)

    @contextmanager
    def filled_by(self, model: Any) -> Iterator[None]:
        """Record the model's state while it fills the cache in the block, for `check_model`."""
        if self._state is None or self.get_seq_length() == 0:
            self.begin(model)
        try:
            yield
        finally:
            if self._state is not None:
                self._state = self._state.after_run(model)

    def begin(self, model: Any) -> None:
        """Record the model's state before it fills the empty cache."""
        self.remember(model)

    def remember(self, model: Any) -> None:
        """Record the model's present state as the one that filled the sequences."""
        self._state = ModelState.of(model)

    def _check_dimensions(self, model: Any) -> None:
        """Refuse a model whose dimensions, dtype or device differ from those of the empty cache."""
        info = inspect_model(model)
        same = replace(info, fingerprint=self.info.fingerprint) == self.info
        if not same or dimensions_of(model, info).layers != self.resources.dimensions.layers:
            raise UsageError(
                "This SpeCache was made for another model, or the model's dtype, device or dimensions changed since. Start a new "
                "SpeCache(model, config)."
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of stored tokens of the longest sequence."""
        return max((sequence.length for sequence in self.sequences), default=0)

    @property
    def finish_reasons(self) -> list[str | None]:
        """Return why each sequence's last generation ended.

        `stop`, `length`, `interrupted` or `error`; `None` before the first.
        """
        return [sequence.finish_reason for sequence in self.sequences]

    def release_device_batch(self) -> None:
        """Move the state of an attached device batch back into its sequences."""
        if self.detach_device_batch is not None:
            self.detach_device_batch()

    def stats(self) -> dict[str, Any]:
        """Return the statistics so far, ready for JSON.

        Keys: those of `specache.stats.report`, `slow_tier`, and `slow_tier_choice` of `auto`. Any
        thread may call this, also during generation.
        """
        if not self.in_use.elsewhere:
            self.release_device_batch()
        choice = None if self.tier_choice is None else self.tier_choice.to_dict()
        tier = {"slow_tier": str(self.config.slow_tier), "slow_tier_choice": choice}
        return {**report(self.memory(), self.counters, self.resources.budget.peak), **tier}

    def held_bytes(self) -> int:
        """Return the sequences' bytes of fast memory, with shared pages once per sequence."""
        return sum(sequence.held_bytes() for sequence in self.sequences)

    def memory(self) -> MemoryUse:
        """Return the bytes held now. Rows that its sequences share count once.

        Those shared with other caches count in each: `context.row_memory.used` has them once.
        """
        memory = sum((sequence.memory() for sequence in self.sequences), MemoryUse())
        memory.slow = held_bytes(sequence.tier for sequence in self.sequences)
        return memory

    def fork(self, policy: Policy | str | None = None, **changes: Any) -> SpeCache:
        """Return an independent copy of the cache, optionally with other settings.

        The low-bit pages are shared, unless `code`, `bits`, `group_size` or `residual` change: then
        the 16-bit rows are quantised again. The rotated code keeps the original's key weights, made
        from its first `residual + group_size` tokens, because later queries are not stored. Rows in
        main memory are shared too, in blocks that are copied when one side writes to them (for a
        GPU they are copied at once). With another `slow_tier` or `slow_dir` the rows are stored
        there (shared, if both are in main memory), and `policy="auto"` is chosen anew.

        Raises:
            UsageError: policy `full` to a low-bit policy.
            SlowTierError: the rows cannot be read or written.
            FastMemoryError: `fast_memory` does not allow the other tier's buffers.
        """
        if policy is not None:
            changes["policy"] = policy
        config, moves = self._forked_config(changes)
        if self.config.policy is Policy.FULL and config.policy is not Policy.FULL:
            raise UsageError("A cache with policy 'full' has no low-bit copy; prefill a new SpeCache with the other policy.")
        here = config.with_changes(slow_tier=self.config.slow_tier, slow_dir=self.config.slow_dir)
        with self.in_use.by("fork"), modes.ours():
            self.release_device_batch()
            other = object.__new__(SpeCache)
            other._begin(self.context.fork(here), self._model, self.asked.with_changes(**changes))
            other._tier_is_fixed = bool(self.sequences)
            other.tier_choice, other.on_disk_chosen = None if moves else self.tier_choice, self.on_disk_chosen
            other.counters.prefill_s = self.counters.prefill_s
            other._state = self._state
            other.sequences = [sequence.fork(other.context) for sequence in self.sequences]
            if moves:
                try:
                    other._move_rows(config)
                except BaseException:
                    other.free()
                    raise
                other.context.count_anew()
        return other

    def config_with(self, **changes: Any) -> SpeCacheConfig:
        """Return the settings of an `empty_fork`. Any thread may call this.

        Raises:
            ConfigError: the settings are not possible.
            UsageError: policy `full` to a low-bit policy.
        """
        config, _ = self._forked_config(changes)
        if self.config.policy is Policy.FULL and config.policy is not Policy.FULL:
            raise UsageError("This cache keeps 16-bit pairs only (policy 'full'): a low-bit policy needs a cache of its own.")
        return config

    def empty_fork(self, **changes: Any) -> SpeCache:
        """Return an empty cache with other settings over the same fast memory and page pools.

        Raises as `config_with`.
        """
        other = object.__new__(SpeCache)
        other._begin(self.context.fork(self.config_with(**changes)), self._model, self.asked.with_changes(**changes))
        other.tier_choice, other.on_disk_chosen = self.tier_choice, self.on_disk_chosen
        return other

    def _forked_config(self, changes: dict[str, Any]) -> tuple[SpeCacheConfig, bool]:
        """Return the settings of a fork, and whether its rows go to another tier.

        Adds to `changes` what follows from another tier.
        """
        if changes.get("slow_tier", SlowTierKind.DISK) != SlowTierKind.DISK:  # `disk:FOLDER` names its own
            changes.setdefault("slow_dir", None)
        if "slow_tier" in changes or "slow_dir" in changes:
            changes.setdefault("policy", self.asked.policy)
        config = self.config.with_changes(**changes).resolved(self.info.device.type)
        return config, (config.slow_tier, config.slow_dir) != (self.config.slow_tier, self.config.slow_dir)

    def __deepcopy__(self, memo: dict[int, Any]) -> SpeCache:
        """Return `fork()`: transformers' caches are copied this way to reuse a prefilled prompt."""
        memo[id(self)] = other = self.fork()
        return other

    def __copy__(self) -> SpeCache:
        """Return `fork()`: two caches over the same sequences would corrupt each other."""
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "A SpeCache cannot be pickled: its 16-bit pairs, threads and files belong to this process. To keep its state or to "
            "continue it in another process use a session (specache.Session); to copy it here use cache.fork()."
        )

    def new_sequence(self) -> Sequence:
        return Sequence(self.context)

    def repeat(self, sequence: Sequence) -> Sequence:
        """Return a fork of one of this cache's sequences, for an equal prompt."""
        self.release_device_batch()
        return sequence.fork(self.context)

    def reset(self) -> None:
        """Drop every token. The next call begins another text, with the same model and settings.

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
            self.context.count_from_zero()

    def close(self) -> None:
        """End background work and free everything, also if a part of it fails.

        Raises:
            UsageError: a call is using it; nothing changed.
        """
        if self.in_use.forked:
            return self._drop_in_child()
        with self.in_use.by("close"):
            self.free()

    def free(self) -> None:
        """Free everything, for the call that holds `in_use`."""
        sequences, self.sequences = self.sequences, []
        with ExitStack() as stack:  # callbacks run in reverse: the worker ends last
            stack.callback(self.context.end_worker)
            for sequence in sequences:
                stack.callback(sequence.clear)
            stack.callback(self.release_device_batch)

    def _drop_in_child(self) -> None:
        """Free the memory in a forked process, and leave threads and files to its parent."""
        self.sequences, self.detach_device_batch = [], None
        self.context.forget_worker()

    def __enter__(self) -> SpeCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _move_rows(self, config: SpeCacheConfig) -> None:
        """Move all stored rows to the slow tier of `config`. An error changes nothing."""
        self.release_device_batch()
        context = self.context
        before, tiers = context.config, list[SlowTier]()
        try:
            context.config = config
            for sequence in self.sequences:
                sequence.claim_buffers()
                tiers.append(context.new_tier())
                sequence.copy_rows(tiers[-1])
        except BaseException:
            context.config = before
            for tier in tiers:
                tier.close()
            for sequence in self.sequences:
                sequence.claim_buffers()
            raise
        context.end_worker()  # the next one has the threads of the new tier
        for sequence, tier in zip(self.sequences, tiers, strict=True):
            sequence.use_tier(tier)

    def _report_disk(self, choice: TierChoice) -> None:
        """Report that the rows go to disk, which is slower."""
        if self.on_disk_chosen is not None:
            return self.on_disk_chosen(choice)
        warnings.warn(
            f"slow_tier='auto' keeps the 16-bit pairs on disk, in {choice.slow_dir}: {choice.reason}. Name a tier to decide that "
            "yourself (slow_tier='ram-inplace').",
            RuntimeWarning,
            stacklevel=2,
        )

    # The interface of transformers' caches

    is_compileable = False

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse a stock call."""
        raise UsageError(_STOCK)

    get_mask_sizes = get_query_offset = get_max_cache_shape = reorder_cache = activate_past_recording = update

    def __getattr__(self, name: str) -> NoReturn:
        """Say what to do instead of a method that only transformers' Cache has."""
        from transformers import Cache

        if name.startswith("_") or not hasattr(Cache, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        advice = _SHORTEN if name == "crop" else _STOCK
        raise AttributeError(f"A SpeCache has no {name!r} of transformers' Cache. {advice}", name=name, obj=self)
