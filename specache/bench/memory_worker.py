"""A process that prefills a prompt and decodes, under a memory limit set after it has loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from specache.bench import greedy
from specache.bench.prefill_worker import DYNAMIC, read_with_dynamic_cache
from specache.bench.shapes import ModelSource
from specache.cache.cache import SpeCache
from specache.config import SpeCacheConfig
from specache.engine.attention_hook import attached
from specache.engine.chunked_prefill import Progress
from specache.model.dimensions import dimensions_of
from specache.platform import heap


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        method: `dynamic`, or anything else for a SpeCache.
        config: of the SpeCache. Its `prefill_chunk` applies to every method.
        context: tokens of the prompt.
        text: the prompt's file (see `ModelSource.prompt`).
        steps: timed decode steps after the prompt. One untimed step comes before them.
    """

    source: ModelSource
    method: str
    config: SpeCacheConfig
    context: int
    text: Path | None
    steps: int
    threads: int
    seed: int


def serve(connection: Connection, job: Job) -> None:
    """Run the job in the child process.

    Sends the model's dimensions once it is loaded and waits for an answer. Then sends the number of
    prompt tokens read so far, after each chunk, and last a list of the steps' milliseconds.
    """
    heap.keep_small()
    torch.set_num_threads(job.threads)
    model = job.source.load()
    prompt = job.source.prompt(job.context, job.text, job.seed)
    connection.send(dimensions_of(model))
    connection.recv()
    run = _dynamic if job.method == DYNAMIC else _specache
    with attached(model):  # for both methods: same linear layers, stock attention for `dynamic`
        connection.send(run(model, job, prompt, lambda done, total: connection.send(done)))


def _specache(model: Any, job: Job, prompt: list[int], progress: Progress) -> list[float]:
    with SpeCache(model, job.config) as cache:
        first = greedy.read_prompt(model, cache, prompt, progress)
        return _timed(greedy.GreedySteps(model, cache, [first]).step, job.steps)


def _dynamic(model: Any, job: Job, prompt: list[int], progress: Progress) -> list[float]:
    cache, logits = read_with_dynamic_cache(model, torch.tensor([prompt]), job.config.prefill_chunk, progress)
    token, length = logits.argmax(-1), len(prompt)

    @torch.no_grad()
    def step() -> None:
        nonlocal token, length
        positions = torch.full_like(token, length)
        output = model(token, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, length = output.logits.argmax(-1), length + 1

    return _timed(step, job.steps)


def _timed(step: Callable[[], None], steps: int) -> list[float]:
    """Return the milliseconds of each step but the first."""
    samples = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        step()
        samples.append((time.perf_counter() - started) * 1e3)
    return samples[1:]
