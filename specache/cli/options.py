"""Options that several commands share, and their conversion to settings and arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from specache.cli.byte_sizes import UNITS, number_and_unit, parse_size
from specache.cli.compiling import ONE_AND_TWO_ROWS, compile_model
from specache.cli.console import quiet_libraries, status
from specache.cli.models import Device, Dtype, LoadedModel, load
from specache.cli.threads import set_threads
from specache.config import DEFAULTS_OF_BITS, Code, Policy, ReadPath, SlowTierKind, SpeCacheConfig, parse_slow_tier
from specache.errors import ConfigError
from specache.eval.setting_fields import flag
from specache.linear.weight_format import WeightFormat
from specache.platform import heap
from specache.platform.text_files import check_text, typed_text

MODEL_PANEL = "Model"
CACHE_PANEL = "Key-value cache"
SAMPLING_PANEL = "Generation"
COLDEST = 1e-4  # temperatures below are greedy: logits divided by less leave float32's range
_DEFAULTS = SpeCacheConfig()


def _of_bits(name: str) -> str:
    """Return the defaults of a setting in words: `128 at 2 bits, 64 at 4, 256 at 1`."""
    defaults = {bits: DEFAULTS_OF_BITS[bits][name] for bits in (2, 4, 1)}
    return ", ".join(f"{value} at {bits}{' bits' if bits == 2 else ''}" for bits, value in defaults.items())


Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Hub name, folder, .gguf file, or 'demo'.", rich_help_panel=MODEL_PANEL, metavar="MODEL"),
]
OptionalModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Hub name, folder, .gguf file, or 'demo'.", rich_help_panel=MODEL_PANEL, metavar="MODEL"),
]
ShapeName = Annotated[
    str | None,
    typer.Option(
        "--shape",
        help="Instead of a model: the dimensions of smollm2-135m, llama-3.2-1b, llama-3.2-3b or llama-3-8b. What runs gets random "
        "weights.",
        rich_help_panel=MODEL_PANEL,
        metavar="NAME",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="Number format. auto: bfloat16 where the processor has instructions for it, else float32.",
        rich_help_panel=MODEL_PANEL,
    ),
]
WeightsOption = Annotated[
    WeightFormat,
    typer.Option(
        "--weights",
        help="Number format of the weights. auto: that of --dtype. int8, int4: read fewer bytes per token (CPU only); int4 is the "
        "fastest and changes answers.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the decode step first (torch.compile; half a minute the first time, later processes load it in seconds; "
        "needs a C++ compiler on a CPU). On a CPU only for models whose layers do not run as programs in C++, which are faster: "
        "there 'chat' and 'generate' with 512 or more new tokens load what is there by themselves, and else have it compiled in "
        "the background.",
        show_default=False,
        rich_help_panel=MODEL_PANEL,
    ),
]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="auto: CUDA if there is one, else the CPU.", rich_help_panel=MODEL_PANEL)
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU threads. Default: PyTorch's, within a container's limit.", rich_help_panel=MODEL_PANEL
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub model.", rich_help_panel=MODEL_PANEL),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only models that are on this machine.", rich_help_panel=MODEL_PANEL)]

Bits = Annotated[
    int,
    typer.Option("--bits", "-b", help="Bits per number of the low-bit copy: 1, 2 or 4.", rich_help_panel=CACHE_PANEL),
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
        help=f"16-bit pairs swapped in per key-value head and step. Default: {_of_bits('top_k')}.",
        show_default=False,
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

MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        help="Longest answer, in tokens; shortened to what the model's positions leave. Default: 256.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        min=0.0,
        help="Above 0: sample. 0: always the likeliest token. Default: 0, or 1 with another sampling option.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this share of the probability.", rich_help_panel=SAMPLING_PANEL),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        help="Leave out tokens less likely than this, relative to the likeliest.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
TopKSampling = Annotated[
    int | None,
    typer.Option("--top-k-sampling", min=1, help="Sample from this many tokens.", rich_help_panel=SAMPLING_PANEL),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1: repeat less.", rich_help_panel=SAMPLING_PANEL),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Repeat a sampled answer.", rich_help_panel=SAMPLING_PANEL)]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        help="Stop before this text. May be given several times.",
        metavar="TEXT",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
System = Annotated[str | None, typer.Option("--system", help="System message.", metavar="TEXT")]  # to be read by `system_text`
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def check_model_or_shape(model: str | None, shape: str | None) -> None:
    """Check that exactly one of model and shape is given.

    Raises:
        ConfigError: none or both are.
    """
    if (model is None) == (shape is None):
        raise ConfigError("Name a model with --model, or a shape with --shape; one of the two.")


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


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Length, sampling and stopping of an answer."""

    max_new_tokens: MaxNewTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    min_p: MinP = None
    top_k_sampling: TopKSampling = None
    repetition_penalty: RepetitionPenalty = None
    seed: Seed = None
    stop: Stop = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `specache.generate`.

        All are explicit, since models ship sampling defaults. Decoding is greedy unless a
        temperature above 0, or any other sampling option without a temperature, is given.

        Raises:
            ConfigError: a value is invalid.
        """
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens must be 1 or more, got {self.max_new_tokens}.")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise ConfigError(f"--repetition-penalty must be above 0 (1 is none), got {self.repetition_penalty}.")
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,  # None: see `answer_length.answer_limit`
            "num_beams": 1,
            "num_return_sequences": 1,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "do_sample": self._samples,
        }
        if self._samples:
            arguments["temperature"] = 1.0 if self.temperature is None else self.temperature
            arguments["top_p"] = 1.0 if self.top_p is None else self.top_p
            arguments["top_k"] = 0 if self.top_k_sampling is None else self.top_k_sampling  # 0: no limit
            arguments["min_p"] = self.min_p
        return arguments

    def stops(self) -> list[str]:
        """Return the stop strings.

        Raises:
            ConfigError: one is empty, which would stop everywhere.
        """
        stops = [check_text(stop, "--stop", ConfigError) for stop in self.stop or []]
        if not all(stops):
            raise ConfigError("--stop needs a text that is not empty.")
        return stops

    def set_seed(self) -> None:
        """Seed the sampling, if a seed was given."""
        if self.seed is not None:
            import torch

            torch.manual_seed(self.seed)

    @property
    def _samples(self) -> bool:
        if self.temperature is not None:
            return self.temperature >= COLDEST
        return any(value is not None for value in (self.top_p, self.min_p, self.top_k_sampling))


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: DtypeOption = Dtype.AUTO
    weights: WeightsOption = WeightFormat.AUTO
    compile: Compile = None
    device: DeviceOption = Device.AUTO
    threads: Threads = None
    revision: Revision = None
    offline: Offline = False

    def load(
        self,
        model: str,
        message: str,
        config: SpeCacheConfig = ONE_AND_TWO_ROWS,
        sequences: int = 1,
        new_tokens: int | None = None,
    ) -> LoadedModel:
        """Load a model, and compile the steps that `config` uses (`compile_model`).

        Args:
            message: shown meanwhile.
            new_tokens: those expected of the command; `None` compiles only with `--compile`.
        """
        quiet_libraries()
        set_threads(self.threads)
        with status(message) as say:
            loaded = load(
                model,
                dtype=self.dtype,
                weights=self.weights,
                device=self.device,
                revision=self.revision,
                offline=self.offline,
                on_progress=say,
            )
            compile_model(loaded.model, config, sequences, self.compile, new_tokens, say)
        return loaded


def system_text(system: str | None) -> str | None:
    """Return a system message with LF as line ending.

    Raises:
        ConfigError: it is not text.
    """
    return None if system is None else typed_text(system, "--system", ConfigError)


def keep_memory_bounded(config: SpeCacheConfig) -> None:
    """Make the heap return freed memory if memory is limited."""
    if config.fast_memory is not None or config.slow_tier is SlowTierKind.DISK:
        heap.keep_small()
