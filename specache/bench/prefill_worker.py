"""A process that prefills on request, so that its peak memory is that of one implementation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import specache
from specache.bench import compute_device
from specache.bench.child import Child, ChildEnded
from specache.bench.shapes import ModelSource
from specache.config import SpeCacheConfig
from specache.engine.chunked_prefill import Progress
from specache.errors import BenchmarkError

SPECACHE, DYNAMIC = "specache", "dynamic"
WARMUP_TOKENS = 64


@dataclass(frozen=True)
class Job:
    """What a worker runs.

    Attributes:
        impl: `specache` or `dynamic`.
        config: of the SpeCache. Its `prefill_chunk` applies to both implementations.
        context: tokens of the prompt.
    """

    source: ModelSource
    impl: str
    config: SpeCacheConfig
    context: int
    threads: int
    seed: int


@dataclass(frozen=True)
class Reading:
    """The measurements of one prefill.

    Attributes:
        idle_bytes: memory in use with the model loaded, before the first prefill: resident in the
            process, or allocated on the GPU.
        peak_bytes: the most memory in use until the prefill's end.
    """

    seconds: float
    idle_bytes: int
    peak_bytes: int


class Worker:
    """The process of a job. Call `close` at the end.

    Raises:
        BenchmarkError: the process cannot load the model.
    """

    def __init__(self, job: Job) -> None:
        self._child = Child(_serve, job)
        try:
            self._child.receive()
        except BaseException:
            self.close()
            raise

    def prefill(self) -> Reading:
        """Prefill the prompt once.

        Raises:
            BenchmarkError: it failed, or the process was ended (because memory ran out, for
                example).
        """
        self._child.send(True)
        try:
            reading: Reading = self._child.receive()
        except ChildEnded as ended:
            raise BenchmarkError(f"{ended} Choose a shorter --context or a smaller model.") from None
        return reading

    def close(self) -> None:
        """End the process."""
        self._child.close()


class Prefiller:
    """Prefills one prompt repeatedly.

    Args:
        ids: the prompt [1, S].
    """

    def __init__(self, job: Job, model: Any, ids: Tensor) -> None:
        self._job, self._model, self._ids = job, model, ids
        self._device = ids.device.type
        self._read(ids[:, :WARMUP_TOKENS])
        compute_device.release_memory()
        self._idle_bytes = compute_device.held_bytes(self._device)

    def prefill(self) -> Reading:
        """Measure one prefill, and free what it filled."""
        compute_device.reset_peak(self._device)
        compute_device.synchronise()
        started = time.perf_counter()
        self._read(self._ids)
        compute_device.synchronise()
        seconds = time.perf_counter() - started
        peak = compute_device.peak_bytes(self._device)
        compute_device.release_memory()
        return Reading(seconds, self._idle_bytes, peak)

    def _read(self, ids: Tensor) -> None:
        if self._job.impl == DYNAMIC:
            read_with_dynamic_cache(self._model, ids, self._job.config.prefill_chunk)
            return
        with specache.SpeCache(self._model, self._job.config) as cache:
            specache.prefill(self._model, ids, cache=cache)


@torch.no_grad()
def read_with_dynamic_cache(
    model: Any, ids: Tensor, chunk: int, progress: Progress = lambda done, total: None
) -> tuple[DynamicCache, Tensor]:
    """Prefill a prompt [1, S] into transformers' ordinary cache, in chunks.

    Returns:
        The cache, and logits [1, 1, V] of the last token.
    """
    cache = DynamicCache(config=model.config)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        output = model(ids[:, part], position_ids=positions[:, part], past_key_values=cache, use_cache=True, logits_to_keep=1)
        progress(min(start + chunk, ids.shape[1]), ids.shape[1])
    return cache, output.logits


def prefiller(job: Job) -> Prefiller:
    """Load the job's model and draw its prompt."""
    torch.set_num_threads(job.threads)
    model = job.source.load()
    generator = torch.Generator().manual_seed(job.seed)
    vocabulary = model.config.get_text_config().vocab_size
    return Prefiller(job, model, torch.randint(0, vocabulary, (1, job.context), generator=generator).to(model.device))


def _serve(connection: Connection, job: Job) -> None:
    """Run in the child process: send a message when ready, then prefill on each request."""
    prefills = prefiller(job)
    connection.send(True)
    while connection.recv():
        connection.send(prefills.prefill())
