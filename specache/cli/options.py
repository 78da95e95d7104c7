"""Options that several commands share, and their conversion to settings and arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from specache.cli.compiling import ONE_AND_TWO_ROWS, compile_model
from specache.cli.console import quiet_libraries, status
from specache.cli.models import Device, Dtype, LoadedModel, load
from specache.cli.threads import set_threads
from specache.config import SlowTierKind, SpeCacheConfig
from specache.errors import ConfigError
from specache.linear.weight_format import WeightFormat
from specache.platform import heap
from specache.platform.text_files import check_text, typed_text

MODEL_PANEL = "Model"
SAMPLING_PANEL = "Generation"
COLDEST = 1e-4  # temperatures below are greedy: logits divided by less leave float32's range
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
