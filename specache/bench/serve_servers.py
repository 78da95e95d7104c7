"""The servers that are measured: how each is started, and what has to be known to ask it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from specache.bench.serve_process import HOST
from specache.bench.shapes import Weights
from specache.errors import BenchmarkError, ConfigError

SPECACHE, NO_SHARING = "specache", "no sharing"
TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
RIVALS = (TRANSFORMERS, LLAMA_CPP)
_DTYPES = {Weights.FP32: "float32", Weights.FP16: "float16"}  # the rest computes in bfloat16


@dataclass(frozen=True)
class Served:
    """What every server is given.

    Attributes:
        model: folder or hub name, as `from_pretrained` takes it.
        weights: number format of the weights.
        threads: to compute with.
        clients: most requests at once.
        positions: tokens of the longest prompt with its answer.
        options: further words of `specache serve`'s command line.
    """

    model: str
    weights: Weights
    threads: int
    clients: int
    positions: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Server:
    """One server to measure.

    Attributes:
        name: in results.
        command: returns the command line for a port.
        ready_path: answers with 200 when the server takes requests.
        model: name of the model in requests.
        about: what it is in full: the program and the settings that matter.
    """

    name: str
    command: Callable[[int], list[str]]
    ready_path: str
    model: str
    about: str


def specache_server(served: Served, *, sharing: bool = True) -> Server:
    """Return our server, with or without prefix sharing."""
    words = ["--model", served.model, "--dtype", _DTYPES.get(served.weights, "bfloat16"), "--threads", str(served.threads)]
    if served.weights in (Weights.INT8, Weights.INT4):
        words += ["--weights", str(served.weights)]
    words += [*served.options, *(() if sharing else ("--no-prefix-sharing",)), "--served-model-name", "bench"]

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "specache.cli.main", "serve", "--host", HOST, "--port", str(port), *words]

    about = shlex.join(["specache", "serve", *words])
    return Server(SPECACHE if sharing else NO_SHARING, command, "/health", "bench", about)


def transformers_server(served: Served) -> Server:
    """Return `transformers serve` with the same weights.

    Raises:
        ConfigError: it has no such weights.
        BenchmarkError: its libraries are not installed.
    """
    if served.weights in (Weights.INT8, Weights.INT4):
        raise ConfigError(f"transformers serve has no {served.weights} weights on a CPU: choose --weights bf16, fp16 or fp32.")
    missing = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if find_spec(name) is None]
    if missing:
        raise BenchmarkError("transformers serve needs: pip install 'transformers[serving]'")
    words = ["serve", served.model, "--device", "cpu", "--dtype", _DTYPES.get(served.weights, "bfloat16")]

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "transformers.cli.transformers", *words, "--host", HOST, "--port", str(port)]

    return Server(TRANSFORMERS, command, "/health", served.model, shlex.join(["transformers", *words]))


def llama_server(served: Served, gguf: Path, program: Path | None) -> Server:
    """Return llama.cpp's `llama-server`, or else llama-cpp-python's server, under its own name.

    Args:
        gguf: its model.
        program: of llama-server. Default: the one on the PATH.

    Raises:
        ConfigError: `program` is not a program.
        BenchmarkError: neither is installed.
    """
    found = str(program.expanduser()) if program is not None else shutil.which("llama-server")
    if program is not None and not (found and os.access(found, os.X_OK) and Path(found).is_file()):
        raise ConfigError(f"--llama-server {program} is not a program. Name the file llama-server of a llama.cpp that was built.")
    cells = served.positions * served.clients
    if found:
        words = ["--threads", str(served.threads), "--parallel", str(served.clients), "--ctx-size", str(cells), "--jinja"]

        def command(port: int) -> list[str]:
            return [found, "--model", str(gguf), "--host", HOST, "--port", str(port), *words]

        return Server(LLAMA_CPP, command, "/health", "bench", shlex.join(["llama-server", *words]))
    if find_spec("llama_cpp") is None:
        raise BenchmarkError(
            "llama.cpp needs --llama-server FILE (a llama-server that was built), or: pip install 'llama-cpp-python[server]'"
        )
    words = ["--n_ctx", str(served.positions), "--n_threads", str(served.threads), "--interrupt_requests", "false"]

    def python_command(port: int) -> list[str]:
        return [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--host", HOST, "--port", str(port), *words]

    return Server("llama-cpp-python", python_command, "/v1/models", "bench", shlex.join(["llama_cpp.server", *words]))
