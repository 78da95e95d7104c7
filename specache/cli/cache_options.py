"""The settings of `SpeCacheConfig` as options of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from specache.cli.byte_sizes import UNITS, number_and_unit, parse_size
from specache.config import DEFAULTS_OF_BITS, LONG_FROM, Code, Policy, ReadPath, SlowTierKind, SpeCacheConfig, parse_slow_tier
from specache.errors import ConfigError
from specache.eval.setting_fields import flag

CACHE_PANEL = "Key-value cache"
_DEFAULTS = SpeCacheConfig()


def _of_bits(name: str) -> str:
    """Return the defaults of a setting in words: `128 at 2 bits, 64 at 4, 256 at 1`."""
    defaults = {bits: DEFAULTS_OF_BITS[bits][name] for bits in (2, 4, 1)}
    return ", ".join(f"{value} at {bits}{' bits' if bits == 2 else ''}" for bits, value in defaults.items())


Bits = Annotated[
    int,
    typer.Option(
        "--bits",
        "-b",
        help="Bits per number of the low-bit copy: 1, 2 or 4. 1 is a last resort: answers change ten to thirty times as much as "
        "with 2.",
        rich_help_panel=CACHE_PANEL,
    ),
]
CodeOption = Annotated[
    Code,
    typer.Option(
        "--code",
        help="How numbers become bits. kivi: minimum and maximum of a group. rotated: ours, closer to the original at fewer bytes.",
        rich_help_panel=CACHE_PANEL,
    ),
]
GroupSize = Annotated[
    int,
    typer.Option(
        "--group-size",
        "-g",
        help="Tokens (keys) or channels (values) that share a scale; divides 64.",
        rich_help_panel=CACHE_PANEL,
    ),
]
Residual = Annotated[
    int | None,
    typer.Option(
        "--residual",
        help=f"Newest tokens kept at 16 bits. Default: {_of_bits('residual')}.",
        show_default=False,
        rich_help_panel=CACHE_PANEL,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        "-k",
        help=f"16-bit pairs swapped in per key-value head and step. Default: {_of_bits('top_k')}; more in long sequences.",
        show_default=False,
        rich_help_panel=CACHE_PANEL,
    ),
]
LongTopK = Annotated[
    int | None,
    typer.Option(
        "--long-top-k",
        help=f"--top-k of long sequences. Default: --top-k if that is given, else {_of_bits('long_top_k')}.",
        show_default=False,
        rich_help_panel=CACHE_PANEL,
    ),
]
LongFrom = Annotated[
    int,
    typer.Option(
        "--long-from",
        help="Tokens in the low-bit copy from which a sequence is long.",
        rich_help_panel=CACHE_PANEL,
    ),
]
PolicyOption = Annotated[
    Policy,
    typer.Option(
        "--policy",
        help="Which pairs are swapped in, and when they are fetched. none: the low-bit copy alone. "
        "full: the ordinary 16-bit cache.",
        rich_help_panel=CACHE_PANEL,
    ),
]
SlowTier = Annotated[
    str,
    typer.Option(
        "--slow-tier",
        help="Where the 16-bit pairs live. auto: in memory (read in place on the CPU, fetched on a GPU) if prompt and answer fit "
        "into what is free, else on disk under the cache folder; 'specache doctor' shows both. disk:DIR: fetched from files in a "
        "folder, for contexts larger than memory.",
        metavar=f"{'|'.join(kind for kind in SlowTierKind if kind is not SlowTierKind.DISK)}|disk:DIR",
        rich_help_panel=CACHE_PANEL,
    ),
]
HotSet = Annotated[
    str,
    typer.Option(
        "--hot-set",
        help="Room for recently fetched pairs: a fraction of the 16-bit cache (0.08) or bytes (64MB, 1GiB).",
        metavar="BYTES|RATIO",
        rich_help_panel=CACHE_PANEL,
    ),
]
PrefillChunk = Annotated[
    int,
    typer.Option("--prefill-chunk", help="Prompt tokens per forward pass.", rich_help_panel=CACHE_PANEL),
]
FastMemory = Annotated[
    str | None,
    typer.Option(
        "--fast-memory",
        help="Limit of fast memory for everything but the weights: low-bit copy, residual, hot set, read buffers, sliding "
        "windows and what a pass needs (2GB, 512MiB). What cannot fit is refused before it runs. Default: none. See "
        "'specache plan'.",
        metavar="BYTES",
        rich_help_panel=CACHE_PANEL,
    ),
]
CudaGraph = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graph/--no-cuda-graph",
        help="On a GPU, replay a decode step as a CUDA graph. Default: where one can be captured. --cuda-graph: say why where it "
        "cannot.",
        rich_help_panel=CACHE_PANEL,
    ),
]
CudaReads = Annotated[
    ReadPath,
    typer.Option(
        help="On a GPU, how pairs come that nobody fetched ahead: read by the kernel itself, or by the copy stream.",
        rich_help_panel=CACHE_PANEL,
    ),
]
PinnedMemory = Annotated[
    str | None,
    typer.Option(
        "--pinned-memory",
        help="On a GPU, limit of page-locked main memory for the 16-bit pairs (64GB, 512MiB). Default: none.",
        metavar="BYTES",
        rich_help_panel=CACHE_PANEL,
    ),
]


def parse_hot_set(text: str) -> float | int:
    """Return a fraction of the cache (`0.08`), or bytes (`1000000`, `64MB`, `1GiB`).

    Raises:
        ConfigError: the text is neither.
    """
    found = number_and_unit(text)
    if found is None:
        raise ConfigError(f"--hot-set {text!r} is neither a fraction (0.08) nor a size (64MB, 1GiB, 1000000).")
    number, unit = found
    if not unit and (number <= 1 or not number.is_integer()):
        return number  # above 1 the configuration refuses it
    return round(number * UNITS[unit])


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The settings of `SpeCacheConfig` as options with the same names and defaults."""

    bits: Bits = _DEFAULTS.bits
    code: CodeOption = _DEFAULTS.code
    group_size: GroupSize = _DEFAULTS.group_size
    residual: Residual = None
    top_k: TopK = None
    long_top_k: LongTopK = None
    long_from: LongFrom = LONG_FROM
    policy: PolicyOption = _DEFAULTS.policy
    slow_tier: SlowTier = _DEFAULTS.slow_tier.value
    hot_set: HotSet = str(_DEFAULTS.hot_set)
    prefill_chunk: PrefillChunk = _DEFAULTS.prefill_chunk
    fast_memory: FastMemory = None
    cuda_graph: CudaGraph = None
    cuda_reads: CudaReads = _DEFAULTS.cuda_reads
    pinned_memory: PinnedMemory = None

    def config(self) -> SpeCacheConfig:
        """Return the library's configuration.

        Raises:
            ConfigError: a value is invalid.
        """
        settings = dict(vars(self))
        settings["slow_tier"], settings["slow_dir"] = parse_slow_tier(self.slow_tier)
        settings["hot_set"] = parse_hot_set(self.hot_set)
        for name in ("fast_memory", "pinned_memory"):
            if settings[name] is not None:
                settings[name] = parse_size(settings[name], f"--{flag(name)}")
        return SpeCacheConfig(**settings)
