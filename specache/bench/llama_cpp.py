"""Time decode steps of llama.cpp, through llama-cpp-python."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from specache.bench.gguf_model import write_gguf
from specache.bench.llama_cpp_worker import ANSWER, Job
from specache.bench.shapes import SHAPES, Shape
from specache.errors import BenchmarkError, ConfigError

CACHE_TYPES = ("f16", "q8_0", "q4_0")


def measure(
    model: Shape | str | Path,
    context: int,
    batch: int,
    weights: str,
    cache_type: str,
    steps: int,
    threads: int,
    evicting_bytes: int = 0,
) -> list[float]:
    """Return the milliseconds of `steps` decode steps, with flash attention and `context` tokens of
    every sequence in the cache.

    At most 256 tokens are prefilled. A longer context repeats their keys and values (see
    `llama_state`), which takes the same time.

    Args:
        model: a shape or its name (a file with seeded random weights is written), or the path of a
            .gguf file.
        batch: sequences decoded together, each with cells of its own.
        weights: for a shape, a key of `gguf_model.FORMATS`. A .gguf file has its own format.
        cache_type: of keys and values: `f16`, `q8_0` or `q4_0`.
        evicting_bytes: size of an array that is read before every step, outside of its time, to
            evict everything else from the caches.

    Raises:
        BenchmarkError: llama.cpp is not installed, cannot run this, or was ended by the system.
        ConfigError: an argument is out of range.
    """
    if cache_type not in CACHE_TYPES:
        raise ConfigError(f"llama.cpp's cache can be {', '.join(CACHE_TYPES)}, got {cache_type!r}.")
    if min(context, batch, steps, threads) < 1:
        raise ConfigError("context, batch, steps and threads must be 1 or more.")
    if find_spec("llama_cpp") is None:
        raise BenchmarkError("llama.cpp needs: pip install 'specache[bench]'")
    if isinstance(model, str) and model in SHAPES:
        model = SHAPES[model]
    if not isinstance(model, Shape):
        return _run(Job(str(_existing(Path(model))), context, batch, cache_type, steps, threads, evicting_bytes))
    with tempfile.TemporaryDirectory(prefix="specache-gguf-") as folder:
        path = Path(folder) / "model.gguf"
        try:
            write_gguf(model, weights, path)
        except OSError as error:
            raise BenchmarkError(
                f"cannot write {model.name} as a file for llama.cpp: {error}. Set TMPDIR to a larger disk."
            ) from error
        return _run(Job(str(path), context, batch, cache_type, steps, threads, evicting_bytes))


def _existing(path: Path) -> Path:
    path = path.expanduser()
    if path.suffix.lower() != ".gguf" or not path.is_file():
        raise BenchmarkError(f"llama.cpp reads .gguf files, and the shapes {', '.join(SHAPES)}; {path} is neither.")
    return path


def _run(job: Job) -> list[float]:
    """Run the job in a process of its own and return the milliseconds of each step."""
    command = [sys.executable, "-m", "specache.bench.llama_cpp_worker", job.to_json()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    answers = [line.removeprefix(ANSWER) for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    stderr = " ".join(done.stderr.split())[-300:]
    if not answers:
        raise BenchmarkError(
            f"llama.cpp's process ended with code {done.returncode} (-4: instructions that this processor lacks, build it with "
            f"GGML_NATIVE=OFF; -9: memory ran out). It said: {stderr or 'nothing'}"
        )
    answer = json.loads(answers[-1])
    if "error" in answer:
        raise BenchmarkError(f"{answer['error']} {stderr}".strip())
    samples: list[float] = answer["ms"]
    return samples
