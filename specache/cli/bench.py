"""`specache bench`: measure speed and memory.

Each benchmark's dataclass fields become the options of its command.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from specache.bench import benchmarks
from specache.cli import options
from specache.cli.bench_table import result_table
from specache.cli.console import print_table, quiet_libraries, status
from specache.cli.field_command import field_parameters, make_command, take, take_fields, written_parameters
from specache.cli.json_file import JsonFile, check_json, write_json
from specache.cli.models import DEMO_MODEL, Device, Dtype, check_weights, chosen_device, demo_file, load, locate
from specache.cli.threads import set_threads
from specache.errors import ConfigError
from specache.eval.tasks.texts import load_text

if TYPE_CHECKING:
    from specache.bench.base import Benchmark
    from specache.bench.shapes import ModelSource, Shape, Weights

HELP = (
    "Measure speed and memory: one layer, matrix products, whole models, prefill, slow tiers, what fits under a limit, "
    "servers under load, and the paper's table."
)
EPILOG = """
[bold]Examples[/bold]

specache bench attention --shape llama-3-8b --context 32768 --bits 1,2 --rows 1,2 --json attention.json

specache bench products --shape llama-3.2-1b --formats bf16,int8 --rows 1,2,8 --json products.json

specache bench decode --shape llama-3.2-1b --context 32768 --batch 8 --against dynamic,llama.cpp --json decode.json

specache bench prefill -m demo --context 4096

specache bench scaling -m demo --contexts 2048,8192,32768 --batches 1,8 --plot scaling.png

specache bench tiers -m demo --context 8000 --dir /var/tmp --json tiers.json

sudo specache bench memory --shape llama-3.2-1b --context 65536 --dir /var/tmp --json memory.json

specache bench serve -m demo --no-sharing --against transformers,llama.cpp --json serve.json

specache bench paper --shape mistral-7b --device cuda --out paper.json --plot paper.png

Timings are noisy: implementations take turns within a run, and only figures of one run can be compared.
"""
_BENCHMARK_PANEL = "Benchmark"
_DTYPES = {"fp32": Dtype.FLOAT32, "fp16": Dtype.FLOAT16}  # the rest computes in bfloat16
_FORMATS = "fp32, bf16, fp16, int8, int4"

Seed = Annotated[int, typer.Option("--seed", rich_help_panel="Run", help="Decides synthetic keys, values, weights and prompts.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, rich_help_panel="Run", help="CPU threads. Default: as 'generate' has.")
]
ChosenDevice = Annotated[
    Device,
    typer.Option(
        "--device", rich_help_panel="Run", help="Where models and layers compute. auto: CUDA if there is one, else the CPU."
    ),
]
WeightsName = Annotated[
    str, typer.Option("--weights", rich_help_panel=options.MODEL_PANEL, help=f"Number format: {_FORMATS}.", metavar="FORMAT")
]


@dataclass(frozen=True)
class SharedOptions:
    """Options of every benchmark."""

    json: JsonFile = None
    seed: Seed = 0
    threads: Threads = None
    device: ChosenDevice = Device.AUTO


@dataclass(frozen=True)
class ModelOptions:
    """Further options of benchmarks of whole models."""

    model: options.OptionalModel = None
    shape: options.ShapeName = None
    weights: WeightsName = "bf16"
    revision: options.Revision = None
    offline: options.Offline = False


@dataclass
class NamedModel:
    """A model selected by `--model` (see `specache.bench.shapes.ModelSource`)."""

    name: str
    weights: Weights
    revision: str | None
    offline: bool
    device: Device = Device.CPU
    tokenizer: Any = field(default=None, init=False)  # set by `load`

    @property
    def shape(self) -> Shape | None:
        """Return None: the model has weights of its own."""
        return None

    @property
    def gguf(self) -> str | None:
        """Return the GGUF file of the model or of the demo; None for other models."""
        if self.name == DEMO_MODEL:
            return str(demo_file())
        return self.name if self.name.lower().endswith(".gguf") else None

    def load(self) -> Any:
        """Return the model on its device, and keep its tokenizer."""
        quiet_libraries()
        dtype = _DTYPES.get(self.weights, Dtype.BFLOAT16)
        loaded = load(
            self.name,
            dtype=dtype,
            weights=self.weights.quantised,
            device=self.device,
            revision=self.revision,
            offline=self.offline,
        )
        self.tokenizer = loaded.tokenizer
        return loaded.model

    def pretrained(self) -> str:
        """Return the folder of the model, converted first if it is a GGUF file, or its hub name."""
        return locate(self.name, lambda message: None)[0]

    def prompt(self, tokens: int, text: Path | None, seed: int) -> list[int]:
        """Return the first `tokens` tokens of the file, or of Python's documentation."""
        ids: list[int] = self.tokenizer(load_text(() if text is None else (text,)))["input_ids"]
        if len(ids) < tokens:
            raise ConfigError(f"{text or 'the text'} has {len(ids):,} tokens, {tokens:,} are to be read. Name a longer --text.")
        return ids[:tokens]


class BenchmarkGroup(TyperGroup):
    """One command per benchmark, created on demand, so that only its module is imported."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all benchmarks."""
        return list(benchmarks.BENCHMARKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a benchmark."""
        if cmd_name not in benchmarks.BENCHMARKS:
            return super().get_command(ctx, cmd_name)
        return _command(cmd_name, benchmarks.benchmark_class(cmd_name))


app = typer.Typer(cls=BenchmarkGroup, help=HELP, epilog=EPILOG, no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Benchmarks."""


def _command(name: str, cls: Any) -> Any:
    def command(**values: Any) -> None:
        shared = take(SharedOptions, values)
        device = Device(chosen_device(shared.device))
        source = _source(take(ModelOptions, values), shared.seed, device) if cls.uses_model else None
        _run(take_fields(cls, values), shared, source, device)

    written = [*written_parameters(SharedOptions), *(written_parameters(ModelOptions) if cls.uses_model else [])]
    taken = [parameter.name for parameter in written]
    return make_command(name, cls.summary, command, [*written, *field_parameters(cls, _BENCHMARK_PANEL, taken)])


def _run(benchmark: Benchmark, shared: SharedOptions, source: ModelSource | None, device: Device) -> None:
    """Measure, print, write."""
    from specache.bench.base import BenchContext, document
    from specache.bench.environment import describe

    check_json(shared.json)
    quiet_libraries()
    set_threads(shared.threads)
    where = describe(str(device))
    with status(benchmark.summary) as say:
        bench = BenchContext(source, shared.seed, str(device), say)
        outcome = benchmark.run(bench)
    print_table(result_table(outcome.results, benchmark.columns, outcome.details))
    if shared.json is not None:
        command = shlex.join(["specache", *sys.argv[1:]])
        write_json(shared.json, document(benchmark, bench, outcome, where, command))


def _source(chosen: ModelOptions, seed: int, device: Device) -> ModelSource:
    """Return the model that the options select.

    Raises:
        ConfigError: no model, or both kinds; an unknown shape or format; or a format that the
            device does not support.
    """
    from specache.bench.published_shapes import shape_of
    from specache.bench.shapes import RandomModel, Weights

    options.check_model_or_shape(chosen.model, chosen.shape)
    if chosen.weights not in list(Weights):
        raise ConfigError(f"--weights must be one of {', '.join(Weights)}, got {chosen.weights!r}.")
    weights = Weights(chosen.weights)
    check_weights(weights.quantised, str(device))
    if chosen.shape is not None:
        return RandomModel(shape_of(chosen.shape), weights, seed, str(device))
    return NamedModel(str(chosen.model), weights, chosen.revision, chosen.offline, device)
