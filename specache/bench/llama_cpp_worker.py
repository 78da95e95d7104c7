"""The process that runs llama.cpp: `python -m specache.bench.llama_cpp_worker JOB`.

Input and output are JSON. It is a separate process because a build for instructions that the
machine lacks ends the process instead of raising an error.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from specache.bench.llama_state import SequenceState
from specache.errors import BenchmarkError

DECODED_TOKENS = 256  # tokens prefilled at most; the rest of a context repeats them
WARMUP_STEPS = 2
CELL_MULTIPLE = 256  # llama.cpp rounds a sequence's cells up to a multiple of this
ANSWER = "specache-answer "  # before the JSON line; llama.cpp may print lines of its own


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        path: of the .gguf file.
        context: tokens of every sequence that are in the cache already.
        batch: sequences that are decoded together.
        cache_type: `f16`, `q8_0` or `q4_0`.
        evicting_bytes: of an array that is read before every step.
    """

    path: str
    context: int
    batch: int
    cache_type: str
    steps: int
    threads: int
    evicting_bytes: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Session:
    """llama.cpp with `context` tokens in the cache of each of `batch` sequences.

    Call `close` at the end.

    Raises:
        BenchmarkError: llama.cpp refuses the file or the context.
    """

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._job = job
        self._model = self._context = None
        self._batch: Any = None
        llama_cpp.llama_backend_init()
        try:
            self._load()
            self._batch = llama_cpp.llama_batch_init(max(DECODED_TOKENS, job.batch), 0, 1)
            vocabulary = llama_cpp.llama_model_get_vocab(self._model)
            self._vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
            self._fill()
        except BaseException:
            self.close()
            raise
        self._length = job.context
        self._tokens = [0] * job.batch

    def step(self) -> None:
        """Decode the most likely token of every sequence."""
        batch = self._job.batch
        self._decode(self._tokens, [self._length] * batch, list(range(batch)), kept_logits=batch)
        self._tokens = [int(np.argmax(self._logits(row))) for row in range(batch)]
        self._length += 1

    def close(self) -> None:
        """Free all memory of llama.cpp."""
        if self._batch is not None:
            self._lib.llama_batch_free(self._batch)
        if self._context is not None:
            self._lib.llama_free(self._context)
        if self._model is not None:
            self._lib.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def _load(self) -> None:
        lib, job = self._lib, self._job
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(job.path.encode(), model_params)
        if not self._model:
            raise BenchmarkError(f"llama.cpp cannot load {job.path}.")
        params = lib.llama_context_default_params()
        cells = -(-(job.context + WARMUP_STEPS + job.steps) // CELL_MULTIPLE) * CELL_MULTIPLE
        params.n_ctx = cells * job.batch
        params.n_seq_max = job.batch
        params.n_batch = params.n_ubatch = max(DECODED_TOKENS, job.batch)
        params.n_threads = params.n_threads_batch = job.threads
        params.type_k = params.type_v = getattr(lib, f"GGML_TYPE_{job.cache_type.upper()}")
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False  # every sequence attends to its own cells only
        params.offload_kqv = params.op_offload = False
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise BenchmarkError(
                f"llama.cpp cannot hold {job.batch} x {cells:,} tokens at {job.cache_type} with this model: memory, or its head "
                "dimension is no multiple of 32."
            )

    def _fill(self) -> None:
        """Prefill the beginning of each sequence and lengthen its state to the whole context."""
        decoded = min(self._job.context, DECODED_TOKENS)
        tokens = np.random.default_rng(0).integers(0, self._vocabulary_size, decoded).tolist()
        for sequence in range(self._job.batch):
            self._decode(tokens, list(range(decoded)), [sequence] * decoded, kept_logits=1)
            if decoded < self._job.context:
                self._store(sequence, SequenceState.parse(self._stored(sequence)).extended(self._job.context))
            last = self._lib.llama_memory_seq_pos_max(self._lib.llama_get_memory(self._context), sequence)
            if last != self._job.context - 1:
                raise BenchmarkError(f"llama.cpp holds positions up to {last}, expected {self._job.context - 1}.")

    def _stored(self, sequence: int) -> bytes:
        size = self._lib.llama_state_seq_get_size(self._context, sequence)
        buffer = (ctypes.c_uint8 * size)()
        written = self._lib.llama_state_seq_get_data(self._context, buffer, size, sequence)
        return bytes(buffer)[:written]

    def _store(self, sequence: int, state: Any) -> None:
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if self._lib.llama_state_seq_set_data(self._context, pointer, state.nbytes, sequence) != state.nbytes:
            raise BenchmarkError("llama.cpp did not take the lengthened state. Try llama-cpp-python 0.3.36.")

    def _decode(self, tokens: list[int], positions: list[int], sequences: list[int], kept_logits: int) -> None:
        """Run one forward pass. Logits of the last `kept_logits` tokens are kept."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = place >= len(tokens) - kept_logits
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise BenchmarkError(f"llama.cpp's decode failed with status {status}.")

    def _logits(self, row: int) -> Any:
        """Return the logits of a row, float32 [V]. Wait until they are computed."""
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, row), (self._vocabulary_size,))


def measure_here(job: Job) -> list[float]:
    """Return the milliseconds of every step."""
    session = Session(job)
    array = np.ones(job.evicting_bytes // 4, dtype=np.float32)
    try:
        for _ in range(WARMUP_STEPS):
            session.step()
        samples = []
        for _ in range(job.steps):
            array.sum()
            started = time.perf_counter()
            session.step()
            samples.append((time.perf_counter() - started) * 1e3)
        return samples
    finally:
        session.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Pass only llama.cpp's warnings and errors on to standard error, inside the block."""
    import llama_cpp

    def log(level: int, text: bytes, user_data: Any) -> None:
        if level in (3, 4):
            sys.stderr.write(text.decode(errors="replace"))

    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


def main() -> None:
    """Measure the job of the command line and print `{"ms": [...]}` or `{"error": "..."}`."""
    job = Job(**json.loads(sys.argv[1]))
    try:
        with _quiet():
            answer: dict[str, Any] = {"ms": measure_here(job)}
    except BenchmarkError as error:
        answer = {"error": str(error)}
    print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
