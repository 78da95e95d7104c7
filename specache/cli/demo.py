"""`specache demo`: one question about a long document, answered over three caches side by side,
and a second one from the document's session.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from specache.cli import cache_options, options
from specache.cli.answering import Outcome, answer
from specache.cli.console import (
    EXIT_INTERRUPTED,
    PrefillProgress,
    reports_errors,
    status,
    write,
)
from specache.cli.demo_document import DemoTask, make_task
from specache.cli.demo_report import Run, comparison, second_question
from specache.cli.json_file import print_json
from specache.cli.models import DEMO_MODEL, Device, Dtype, LoadedModel
from specache.cli.prompts import encode_text
from specache.cli.rereading import common_length
from specache.config import Code, Policy, SlowTierKind, SpeCacheConfig
from specache.errors import ConfigError
from specache.linear.weight_format import WeightFormat
from specache.templates.template import ChatTemplate

if TYPE_CHECKING:
    from specache import Session, SpeCache

EPILOG = """
The document is Python's own documentation, with two sentences planted in it that give random numbers. It is read once, into a
session in a temporary folder. The first question is answered over three caches made from it, so that the answers differ in nothing
but the cache they decode over; the second one from the session, opened again as after a restart.

[bold]Examples[/bold]

specache demo --seed 7

specache demo --bits 1
"""
SESSION = "demo"
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
    bits: cache_options.Bits = 2,
    code: cache_options.CodeOption = Code.ROTATED,
    top_k: cache_options.TopK = None,
    policy: cache_options.PolicyOption = Policy.AUTO,
    model: options.Model = DEMO_MODEL,
    dtype: options.DtypeOption = Dtype.AUTO,
    weights: options.WeightsOption = WeightFormat.AUTO,
    compile: options.Compile = None,
    device: options.DeviceOption = Device.AUTO,
    threads: options.Threads = None,
) -> None:
    """Ask a model about a long document over three caches (SpeCache, 16 bits, low bits alone), and
    again from its session.
    """
    pairs: dict[str, Any] = {} if top_k is None else {"top_k": top_k}
    config = SpeCacheConfig(bits=bits, code=code, policy=policy, **pairs)
    if seed is None:
        seed = random.SystemRandom().randrange(10_000)
    loading = options.LoadOptions(dtype=dtype, weights=weights, compile=compile, device=device, threads=threads)
    loaded = loading.load(model, "Loading the model")
    task = make_task(loaded.tokenizer, tokens=tokens, seed=seed, depth=depth)
    template = ChatTemplate(loaded.tokenizer)
    ids = _encoded(loaded, template, task)
    _check_length(loaded, ids)
    out = Console(highlight=False, quiet=as_json)
    _introduce(out, loaded, task, len(ids), seed, depth)
    with TemporaryDirectory(prefix="specache-demo-") as folder:
        again, runs = None, _runs(out, loaded, ids, task, config, folder)
        if not as_json:
            out.print(comparison(runs, config))
        if not _interrupted(runs[-1]):
            again = _asked_again(out, loaded, template, task, config, folder)
    if as_json:
        print_json(_document(loaded, task, runs, again, seed, depth))
    elif again is not None:
        out.print(second_question(runs[0], again))
    if _interrupted(again or runs[-1]):
        raise typer.Exit(EXIT_INTERRUPTED)


def _encoded(loaded: LoadedModel, template: ChatTemplate, task: DemoTask) -> list[int]:
    return template.encode(template.ask(task.prompt)) if template.exists else encode_text(loaded.tokenizer, task.prompt)


def _interrupted(run: Run) -> bool:
    return run.result.finish_reason == "interrupted"


def _check_length(loaded: LoadedModel, ids: list[int]) -> None:
    longest = loaded.max_positions
    if longest is not None and len(ids) + MAX_NEW_TOKENS > longest:
        raise ConfigError(f"{loaded.name} has {longest:,} positions; --tokens can be {longest - 200:,} at most.")


def _introduce(out: Console, loaded: LoadedModel, task: DemoTask, length: int, seed: int, depth: float) -> None:
    layers = loaded.model.config.get_text_config().num_hidden_layers
    out.print(f"[bold]Document[/bold]  Python's documentation, {length:,} tokens ({loaded.name}, {layers} layers)")
    out.print(f"[bold]Planted [/bold]  at {depth:.0%}: {task.fact}  (seed {seed})")
    out.print(f"[bold]Question[/bold]  {task.question}")


def _runs(out: Console, loaded: LoadedModel, ids: list[int], task: DemoTask, config: SpeCacheConfig, folder: str) -> list[Run]:
    """Read the document into a session in `folder`, then answer over a fork per compared cache.

    The forks have their rows in main memory. An interrupt stops after the current one.
    """
    compared_caches = (
        ComparedCache(f"SpeCache, {config.bits} bits", config.policy),
        ComparedCache("16-bit cache", Policy.FULL),
        ComparedCache(f"{config.bits} bits alone", Policy.NONE),
    )
    runs: list[Run] = []
    with _session(loaded, config, folder) as session:
        _read(loaded, ids, session)
        for compared in compared_caches:
            with session.cache.fork(compared.policy, slow_tier=SlowTierKind.AUTO) as cache:
                runs.append(_run(out, loaded, ids, task, cache, compared.name, streams=not runs))
            if _interrupted(runs[-1]):
                break
    return runs


def _session(loaded: LoadedModel, config: SpeCacheConfig, folder: str) -> Session:
    import specache

    return specache.Session(SESSION, loaded.model, config, tokenizer=loaded.tokenizer, folder=folder)


def _read(loaded: LoadedModel, ids: list[int], session: Session) -> None:
    import torch

    import specache

    progress = PrefillProgress("Reading the document")
    try:
        input_ids = torch.tensor([ids], device=loaded.model.device)
        specache.prefill(loaded.model, input_ids, cache=session.cache, progress=progress)
    finally:
        progress.close()
    session.save()


def _asked_again(
    out: Console, loaded: LoadedModel, template: ChatTemplate, task: DemoTask, config: SpeCacheConfig, folder: str
) -> Run:
    """Open the session again and ask the second question, which shares all but its end."""
    assert task.next is not None
    ids = _encoded(loaded, template, task.next)
    out.print(f"[bold]Question[/bold]  {task.next.question}  (of the session, opened again from disk)")
    with _session(loaded, config, folder) as session:
        session.cut(common_length(session.token_ids, ids))
        return _run(out, loaded, ids, task.next, session.cache, "from its session", streams=True)


def _run(out: Console, loaded: LoadedModel, ids: list[int], task: DemoTask, cache: SpeCache, name: str, streams: bool) -> Run:
    generation = options.GenerationOptions(max_new_tokens=MAX_NEW_TOKENS).arguments()
    if streams and not out.quiet:
        out.print("[bold]Answer  [/bold]  ", end="")
        outcome = _answer(loaded, ids, cache, generation, lambda row, text: write(text))
        write("\n")
    else:
        with status(f"The same question over the cache: {name}"):
            outcome = _answer(loaded, ids, cache, generation, None)
    result = outcome.results[0]
    return Run(name, result, task.is_right(result.text), outcome.reused_tokens, cache.stats(), cache.config.to_dict())


def _answer(loaded: LoadedModel, ids: list[int], cache: SpeCache, generation: dict[str, Any], on_text: Any) -> Outcome:
    template = ChatTemplate(loaded.tokenizer)
    outcome = answer(loaded, [ids], cache, generation, template=template if template.exists else None, on_text=on_text)
    outcome.raise_error()
    return outcome


def _document(loaded: LoadedModel, task: DemoTask, runs: list[Run], again: Run | None, seed: int, depth: float) -> dict[str, Any]:
    assert task.next is not None
    return {
        "seed": seed,
        "depth": depth,
        "weights": loaded.weight_format,
        "fact": task.fact,
        "question": task.question,
        "expected": task.code,
        "runs": [run.to_dict() for run in runs],
        "next": {
            "fact": task.next.fact,
            "question": task.next.question,
            "expected": task.next.code,
            "run": None if again is None else again.to_dict(),
        },
    }
