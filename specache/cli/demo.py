"""`specache demo`: one question about a long document, answered over three caches side by side."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from specache.cli import options
from specache.cli.answering import Result, answer
from specache.cli.console import (
    EXIT_INTERRUPTED,
    PrefillProgress,
    reports_errors,
    status,
    write,
)
from specache.cli.demo_document import DemoTask, make_task
from specache.cli.demo_report import Run, comparison
from specache.cli.json_file import print_json
from specache.cli.models import DEMO_MODEL, Device, Dtype, LoadedModel
from specache.cli.prompts import encode_text
from specache.config import Code, Policy, SlowTierKind, SpeCacheConfig
from specache.errors import ConfigError
from specache.linear.weight_format import WeightFormat
from specache.templates.template import ChatTemplate

if TYPE_CHECKING:
    from specache import SpeCache

EPILOG = """
The document is Python's own documentation, with one sentence planted in it that gives a random number.
The same prefill serves all three answers, so that they differ in nothing but the cache they decode over.

[bold]Examples[/bold]

specache demo --seed 7

specache demo --bits 1
"""
MAX_NEW_TOKENS = 32
"""Tokens of one answer: the question needs about 17."""


@dataclass(frozen=True)
class ComparedCache:
    """One of the compared caches."""

    name: str
    policy: Policy


@reports_errors
def demo(
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the document, about.")] = 7000,
    depth: Annotated[float, typer.Option("--depth", min=0.0, max=1.0, help="Where the fact is planted: 0 is the beginning.")] = 0.9,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides the number. Default: a new one.")] = None,
    as_json: options.Json = False,
    bits: options.Bits = 2,
    code: options.CodeOption = Code.ROTATED,
    top_k: options.TopK = None,
    policy: options.PolicyOption = Policy.AUTO,
    model: options.Model = DEMO_MODEL,
    dtype: options.DtypeOption = Dtype.AUTO,
    weights: options.WeightsOption = WeightFormat.AUTO,
    compile: options.Compile = None,
    device: options.DeviceOption = Device.AUTO,
    threads: options.Threads = None,
) -> None:
    """Ask a model about a long document over three caches: SpeCache, 16 bits, low bits alone."""
    pairs: dict[str, Any] = {} if top_k is None else {"top_k": top_k}
    config = SpeCacheConfig(bits=bits, code=code, policy=policy, slow_tier=SlowTierKind.RAM, **pairs)
    if seed is None:
        seed = random.SystemRandom().randrange(10_000)
    loading = options.LoadOptions(dtype=dtype, weights=weights, compile=compile, device=device, threads=threads)
    loaded = loading.load(model, "Loading the model")
    task = make_task(loaded.tokenizer, tokens=tokens, seed=seed, depth=depth)
    template = ChatTemplate(loaded.tokenizer)
    ids = template.encode(template.ask(task.prompt)) if template.exists else encode_text(loaded.tokenizer, task.prompt)
    _check_length(loaded, ids)
    out = Console(highlight=False, quiet=as_json)
    _introduce(out, loaded, task, len(ids), seed, depth)
    runs = _runs(out, loaded, ids, task, config)
    if as_json:
        print_json(_document(loaded, task, runs, seed, depth))
    else:
        out.print(comparison(runs, config))
    if runs[-1].result.finish_reason == "interrupted":
        raise typer.Exit(EXIT_INTERRUPTED)


def _check_length(loaded: LoadedModel, ids: list[int]) -> None:
    longest = loaded.max_positions
    if longest is not None and len(ids) + MAX_NEW_TOKENS > longest:
        raise ConfigError(f"{loaded.name} has {longest:,} positions; --tokens can be {longest - 200:,} at most.")


def _introduce(out: Console, loaded: LoadedModel, task: DemoTask, length: int, seed: int, depth: float) -> None:
    layers = loaded.model.config.get_text_config().num_hidden_layers
    out.print(f"[bold]Document[/bold]  Python's documentation, {length:,} tokens ({loaded.name}, {layers} layers)")
    out.print(f"[bold]Planted [/bold]  at {depth:.0%}: {task.fact}  (seed {seed})")
    out.print(f"[bold]Question[/bold]  {task.question}")


def _runs(out: Console, loaded: LoadedModel, ids: list[int], task: DemoTask, config: SpeCacheConfig) -> list[Run]:
    """Prefill once, then answer over a copy of the cache per compared cache.

    An interrupt stops after the current one.
    """
    compared_caches = (
        ComparedCache(f"SpeCache, {config.bits} bits", config.policy),
        ComparedCache("16-bit cache", Policy.FULL),
        ComparedCache(f"{config.bits} bits alone", Policy.NONE),
    )
    runs: list[Run] = []
    with _prefilled(loaded, ids, config) as shared:
        for compared in compared_caches:
            run = _run(out, loaded, ids, task, shared, compared, streams=not runs)
            runs.append(run)
            if run.result.finish_reason == "interrupted":
                break
    return runs


def _prefilled(loaded: LoadedModel, ids: list[int], config: SpeCacheConfig) -> SpeCache:
    import torch

    import specache

    cache = specache.SpeCache(loaded.model, config)
    progress = PrefillProgress("Reading the document")
    try:
        input_ids = torch.tensor([ids], device=loaded.model.device)
        specache.prefill(loaded.model, input_ids, cache=cache, progress=progress)
    except BaseException:
        cache.close()
        raise
    finally:
        progress.close()
    return cache


def _run(
    out: Console,
    loaded: LoadedModel,
    ids: list[int],
    task: DemoTask,
    shared: SpeCache,
    compared: ComparedCache,
    streams: bool,
) -> Run:
    generation = options.GenerationOptions(max_new_tokens=MAX_NEW_TOKENS).arguments()
    with shared.fork(policy=compared.policy) as cache:
        if streams and not out.quiet:
            out.print("[bold]Answer  [/bold]  ", end="")
            result = _answer(loaded, ids, cache, generation, lambda row, text: write(text))
            write("\n")
        else:
            with status(f"The same question over the cache: {compared.name}"):
                result = _answer(loaded, ids, cache, generation, None)
        return Run(compared.name, result, task.is_right(result.text), cache.stats(), cache.config.to_dict())


def _answer(loaded: LoadedModel, ids: list[int], cache: SpeCache, generation: dict[str, Any], on_text: Any) -> Result:
    template = ChatTemplate(loaded.tokenizer)
    outcome = answer(loaded, [ids], cache, generation, template=template if template.exists else None, on_text=on_text)
    outcome.raise_error()
    return outcome.results[0]


def _document(loaded: LoadedModel, task: DemoTask, runs: list[Run], seed: int, depth: float) -> dict[str, Any]:
    return {
        "seed": seed,
        "depth": depth,
        "weights": loaded.weight_format,
        "fact": task.fact,
        "question": task.question,
        "expected": task.code,
        "runs": [run.to_dict() for run in runs],
    }
