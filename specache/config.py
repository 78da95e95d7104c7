"""The settings of the method, with their units and symbols in the paper."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from specache.errors import ConfigError

PAGE_TOKENS = 64  # tokens in one page of the low-bit copy; group sizes divide it
SUPPORTED_BITS = (1, 2, 4)
DEFAULTS_OF_BITS = {  # chosen by divergence per byte (docs/results.md)
    1: {"residual": 256, "top_k": 256, "long_top_k": 512},
    2: {"residual": 128, "top_k": 128, "long_top_k": 256},
    4: {"residual": 64, "top_k": 64, "long_top_k": 64},
}
LONG_FROM = 15_000  # low-bit tokens

_Member = TypeVar("_Member", bound=StrEnum)


class Policy(StrEnum):
    """Which 16-bit pairs replace low-bit ones in a decode step, and when they are fetched."""

    AUTO = "auto"  # on-demand where a CPU has the rows in memory, verified where they come from a disk or to a GPU
    VERIFIED = "verified"  # prefetch the draft token's selection, then fetch what the real token still lacks
    SPECULATIVE = "speculative"  # the paper: use the draft token's selection (Algorithm 3)
    ON_DEMAND = "on-demand"  # no draft row; every selected pair is fetched inside the layer
    PREVIOUS = "previous"  # no draft row; use the selection of the last step
    NONE = "none"  # KIVI: the low-bit copy alone
    FULL = "full"  # the ordinary 16-bit cache, for comparison

    @property
    def drafts(self) -> bool:
        """Return True if a draft row is decoded beside the real one."""
        return self in (Policy.VERIFIED, Policy.SPECULATIVE)

    @property
    def verifies(self) -> bool:
        """Return True if the real row fetches its own top-k before it finishes the layer."""
        return self in (Policy.VERIFIED, Policy.ON_DEMAND)

    @property
    def prefetches(self) -> bool:
        """Return True if a step submits reads for the next step."""
        return self in (Policy.VERIFIED, Policy.SPECULATIVE, Policy.PREVIOUS)

    @property
    def selects_in_prefill(self) -> bool:
        """Return True if the prompt's last token selects the pairs of the first step."""
        return self.prefetches and not self.drafts

    @property
    def fetches(self) -> bool:
        """Return True if 16-bit pairs replace low-bit ones."""
        return self.verifies or self.prefetches


class Code(StrEnum):
    """The quantiser that encodes a key or a value with `bits` bits per element."""

    KIVI = "kivi"  # minimum and maximum of a group: keys per channel, values per token (paper section 3.1)
    ROTATED = "rotated"  # ours: rotated, normal quantiser, one unbiased scale per token


class SlowTierKind(StrEnum):
    """Where the 16-bit rows are stored."""

    AUTO = "auto"  # in memory (ram-inplace on the CPU, ram otherwise) if a prompt fits there, else disk: decided by `auto_tier`
    RAM_INPLACE = "ram-inplace"  # rows are read where they lie; nothing is copied ahead
    RAM = "ram"  # rows are copied through the hot set in the background
    DISK = "disk"  # the same, from files in a folder; written `disk:FOLDER`


class ReadPath(StrEnum):
    """On a GPU, how rows that the real row lacks are read.

    The draft row's rows always come on the copy queue.
    """

    MAPPED = "mapped"  # by the compute queue itself, over the mapped address: overtakes the prefetches of earlier layers
    COPY = "copy"  # by the copy queue, behind the prefetches of earlier layers; compute waits for the event


class TopK(NamedTuple):
    """How many 16-bit pairs a query selects per KV head (paper `k`), by the low-bit tokens that it
    selects from.

    Attributes:
        short: `k` of fewer than `long_from` low-bit tokens.
        long: `k` of more. Not smaller than `short`.
        long_from: where `long` begins, in low-bit tokens.
    """

    short: int
    long: int
    long_from: int

    @classmethod
    def always(cls, k: int) -> TopK:
        """Return one `k` for every length."""
        return cls(k, k, 0)

    def most(self, candidates: int) -> int:
        """Return `k` of a query that selects from so many low-bit tokens."""
        return self.short if candidates < self.long_from else self.long

    def of(self, candidates: int) -> int:
        """Return how many of so many low-bit tokens a query selects: `k`, or all of them."""
        return min(self.most(candidates), candidates)


@dataclass(frozen=True)
class SpeCacheConfig:
    """Settings of one `SpeCache`. Frozen; invalid values raise `ConfigError` on construction.

    Args:
        bits: bits per code of the low-bit copy (paper `b`): 1, 2 or 4. 1 is a last resort: the
            divergence is ten to thirty times that of 2 (docs/results.md).
        code: see `Code`.
        group_size: tokens per key group and channels per value group (paper `g`); divides 64.
        residual: newest tokens that always stay at 16 bits (paper `R`), in tokens. None takes that
            of the bits in `DEFAULTS_OF_BITS`, 128 at 2 bits; the attribute is always a number.
        top_k: 16-bit pairs swapped in per KV head and step (paper `k`), in pairs. None as for
            `residual`, and at most `long_top_k`: 128 at 2 bits.
        long_top_k: the same in sequences with `long_from` or more low-bit tokens, where more pairs
            are needed for the same divergence. None: `top_k` if that was given, else that of the
            bits, 256 at 2 bits.
        long_from: low-bit tokens from which a sequence takes `long_top_k`.
        policy: see `Policy`.
        slow_tier: see `SlowTierKind`; `disk:FOLDER` also sets `slow_dir`.
        slow_dir: folder of tier `disk`, created if it does not exist. None for every other tier.
        hot_set: budget of recently fetched rows. A float up to 1 is a fraction of the 16-bit cache,
            an integer above 1 is bytes over all sequences and layers. It always holds the `top_k`
            rows in flight.
        prefill_chunk: prompt tokens per forward pass while prefilling.
        fast_memory: limit in bytes of everything in fast memory but the weights (docs/plan.md). A
            request that does not fit is refused before it runs. None is unlimited.
        cuda_graph: on CUDA, replay a decode step as a CUDA graph. None: where one can be captured.
            True: likewise, with a warning and the reason where it cannot. False: launch every
            kernel of every step.
        pinned_memory: on CUDA, bytes of page-locked main memory that the slow tier `ram` may hold.
            None is unlimited.
        cuda_reads: on CUDA, how pairs that the real token lacks are read: `mapped` or `copy`
            (`ReadPath`). Tokens are the same.
    """

    bits: int = 2
    code: Code = Code.ROTATED
    group_size: int = 64
    residual: int = None  # type: ignore[assignment]  # a number after `__post_init__`
    top_k: int = None  # type: ignore[assignment]
    long_top_k: int = None  # type: ignore[assignment]
    long_from: int = LONG_FROM
    policy: Policy = Policy.AUTO
    slow_tier: SlowTierKind = SlowTierKind.AUTO
    slow_dir: str | None = None
    hot_set: float | int = 0.08
    prefill_chunk: int = 1024
    fast_memory: int | None = None
    cuda_graph: bool | None = None
    cuda_reads: ReadPath = ReadPath.MAPPED
    pinned_memory: int | None = None

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or self.bits not in SUPPORTED_BITS:
            raise ConfigError(f"bits must be one of {_join(SUPPORTED_BITS)}, got {self.bits!r}.")
        left_open = [name for name in DEFAULTS_OF_BITS[self.bits] if getattr(self, name) is None]
        defaults = dict(DEFAULTS_OF_BITS[self.bits])
        if "top_k" not in left_open:
            defaults["long_top_k"] = self.top_k
        elif _is_int(self.long_top_k):
            defaults["top_k"] = max(1, min(defaults["top_k"], self.long_top_k))
        for name in left_open:
            object.__setattr__(self, name, defaults[name])
        object.__setattr__(self, "_left_open", frozenset(left_open))
        if not _is_int(self.group_size) or self.group_size < 1 or PAGE_TOKENS % self.group_size:
            divisors = [d for d in range(1, PAGE_TOKENS + 1) if PAGE_TOKENS % d == 0]
            raise ConfigError(
                f"group_size must divide a page of {PAGE_TOKENS} tokens ({_join(divisors)}), got {self.group_size!r}."
            )
        if not _is_int(self.residual) or self.residual < 0:
            raise ConfigError(f"residual must be a number of tokens, 0 or more, got {self.residual!r}.")
        if not _is_int(self.top_k) or self.top_k < 1:
            raise ConfigError(
                f"top_k must be a positive number of pairs, got {self.top_k!r}. To run on the low-bit copy alone use policy='none'."
            )
        if not _is_int(self.long_top_k) or self.long_top_k < self.top_k:
            raise ConfigError(
                f"long_top_k must be a number of pairs, top_k ({self.top_k}) or more, got {self.long_top_k!r}. Leave it out to "
                "use top_k at every length."
            )
        if not _is_int(self.long_from) or self.long_from < 0:
            raise ConfigError(f"long_from must be a number of low-bit tokens, 0 or more, got {self.long_from!r}.")
        if not _is_int(self.prefill_chunk) or self.prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk must be a positive number of tokens, got {self.prefill_chunk!r}.")
        if isinstance(self.hot_set, bool) or not isinstance(self.hot_set, (int, float)) or not self.hot_set >= 0:
            raise ConfigError(f"hot_set must be a fraction of the cache or a number of bytes, got {self.hot_set!r}.")
        if isinstance(self.hot_set, float) and self.hot_set > 1:
            raise ConfigError(
                f"hot_set={self.hot_set!r} is more than the whole cache. Pass a fraction from 0.0 to 1.0, "
                "or an integer number of bytes."
            )
        if self.fast_memory is not None and (not _is_int(self.fast_memory) or self.fast_memory < 1):
            raise ConfigError(f"fast_memory must be a positive number of bytes or None, got {self.fast_memory!r}.")
        if self.pinned_memory is not None and (not _is_int(self.pinned_memory) or self.pinned_memory < 1):
            raise ConfigError(f"pinned_memory must be a positive number of bytes or None, got {self.pinned_memory!r}.")
        if self.cuda_graph not in (None, True, False):
            raise ConfigError(f"cuda_graph must be True, False or None, got {self.cuda_graph!r}.")
        object.__setattr__(self, "code", _member(Code, self.code, "code"))
        object.__setattr__(self, "policy", _member(Policy, self.policy, "policy"))
        object.__setattr__(self, "cuda_reads", _member(ReadPath, self.cuda_reads, "cuda_reads"))
        slow_tier, slow_dir = parse_slow_tier(self.slow_tier, self.slow_dir)
        object.__setattr__(self, "slow_tier", slow_tier)
        object.__setattr__(self, "slow_dir", slow_dir)

    def resolved(self, device_type: str) -> SpeCacheConfig:
        """Return the configuration with both `auto` settings resolved for a model on `device_type`.

        It assumes that main memory suffices.

        Raises:
            ConfigError: `ram-inplace` with a model that is not on the CPU.
        """
        slow_tier = self.slow_tier
        if slow_tier is SlowTierKind.AUTO:
            slow_tier = SlowTierKind.RAM_INPLACE if device_type == "cpu" else SlowTierKind.RAM
        if slow_tier is SlowTierKind.RAM_INPLACE and device_type != "cpu":
            raise ConfigError(
                f"slow_tier='ram-inplace' reads rows where they lie and needs a model on the CPU, but this one is on "
                f"{device_type!r}. Use slow_tier='ram'."
            )
        policy = self.policy
        if policy is Policy.AUTO:
            at_hand = (
                device_type == "cpu" and slow_tier is not SlowTierKind.DISK
            )  # nothing is waited for, so nothing is to be hidden
            policy = Policy.ON_DEMAND if at_hand else Policy.VERIFIED
        return self.with_changes(policy=policy, slow_tier=slow_tier)

    def with_changes(self, **changes: Any) -> SpeCacheConfig:
        """Return these settings with changes.

        What was left open, and is not among the changes, stays open: it takes the default of the
        bits, also of other bits among the changes.
        """
        still_open: dict[str, Any] = dict.fromkeys(self.left_open)
        return replace(self, **{**still_open, **changes})

    @property
    def left_open(self) -> frozenset[str]:
        """Return the names of the settings that were None and took the bits' default."""
        return self.__dict__.get("_left_open", frozenset())

    def low_bit_length(self, length: int) -> int:
        """Return the low-bit tokens of a sequence of `length`: whole groups, oldest first.

        The residual holds the newest `R` to `R + g - 1` tokens (all of a shorter sequence).
        """
        return max(0, (length - self.residual) // self.group_size) * self.group_size

    def completed(self, stored: SpeCacheConfig) -> SpeCacheConfig:
        """Return these settings with what was left open as in `stored`, settings of the same bits.

        A `long_top_k` that follows a given `top_k` is not left open here. A given one bounds the
        `top_k` of `stored`.
        """
        names = self.left_open if "top_k" in self.left_open else self.left_open - {"long_top_k"}
        taken = {name: getattr(stored, name) for name in names}
        if "top_k" in taken and "long_top_k" not in taken:
            taken["top_k"] = min(taken["top_k"], self.long_top_k)
        return replace(self, **taken)

    @property
    def selection(self) -> TopK:
        """Return how many pairs a query selects, by the low-bit tokens of its sequence."""
        return TopK(self.top_k, self.long_top_k, self.long_from)

    @property
    def layout(self) -> tuple[object, ...]:
        """Return the settings that a low-bit copy depends on.

        Caches with different ones cannot share pages.
        """
        return self.code, self.bits, self.group_size, self.residual

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "bits": self.bits,
            "code": str(self.code),
            "group_size": self.group_size,
            "residual": self.residual,
            "top_k": self.top_k,
            "long_top_k": self.long_top_k,
            "long_from": self.long_from,
            "policy": str(self.policy),
            "slow_tier": str(self.slow_tier),
            "slow_dir": self.slow_dir,
            "hot_set": self.hot_set,
            "prefill_chunk": self.prefill_chunk,
            "fast_memory": self.fast_memory,
            "cuda_graph": self.cuda_graph,
            "cuda_reads": str(self.cuda_reads),
            "pinned_memory": self.pinned_memory,
        }


def parse_slow_tier(text: str, folder: str | os.PathLike[str] | None = None) -> tuple[SlowTierKind, str | None]:
    """Return (tier, folder) of `ram`, or of `disk:FOLDER` (or `disk` with `folder`).

    Raises:
        ConfigError: unknown tier, a disk without folder, two folders, or a folder for another tier.
    """
    name, colon, named = (text, "", "") if isinstance(text, SlowTierKind) else str(text).partition(":")
    tier = _member(SlowTierKind, name, "slow_tier")
    given = None if folder is None else os.fspath(folder)
    if tier is not SlowTierKind.DISK:
        if colon or given is not None:
            raise ConfigError(
                f"slow_tier={tier.value!r} takes no folder, got {named or given!r}. Only the disk does: slow_tier='disk:FOLDER'."
            )
        return tier, None
    if named and given is not None and named != given:
        raise ConfigError(f"slow_tier={text!r} and slow_dir={given!r} name two folders. Leave one of them out.")
    if not (named or given):
        raise ConfigError("slow_tier='disk' needs a folder for the 16-bit pairs. Write slow_tier='disk:FOLDER'.")
    return tier, named or given


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _join(values: Iterable[object]) -> str:
    return ", ".join(str(v) for v in values)


def _member(kind: type[_Member], value: Any, name: str) -> _Member:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name} must be one of {_join(kind)}, got {value!r}.") from None
