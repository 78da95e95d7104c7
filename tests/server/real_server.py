"""Real server processes on loopback, which end with the test, and the models that they serve."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from transformers import GenerationConfig

from specache.bench.serve_process import HOST, ServerProcess
from tests.server.tiny_server import TOKENIZER, printable_model

POSITIONS = 16384
START_S = 300.0  # imports take long beside other processes
SERVED_NAME = "tiny"


def save_long_model(folder: Path) -> None:
    """Save a tiny seeded Llama that takes long prompts. Every byte is a token, and its greedy
    answers are printable. It is greedy unless a request asks for more.
    """
    model = printable_model(POSITIONS)
    settings = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id}
    model.generation_config = GenerationConfig(**settings)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


class RealServer:
    """`specache serve` in a process of its own. The end of the `with` block ends it."""

    def __init__(self, model: Path | str, *words: str | Path, name: str = SERVED_NAME, dtype: str = "float32") -> None:
        self._reserved = socket.socket()  # keeps the port from other processes until the server listens there
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # which the server does too
        self._reserved.bind((HOST, 0))
        self.port = self._reserved.getsockname()[1]
        command = [sys.executable, "-m", "specache.cli.main", "serve", "-m", str(model), "--host", HOST, "--port", str(self.port)]
        command += ["--dtype", dtype, "--threads", "1", "--served-model-name", name, *map(str, words)]
        self._process = ServerProcess(command, self.port, cores=None, threads=1, ready_path="/health", name="specache serve")
        self.url = self._process.url

    def __enter__(self) -> RealServer:
        try:
            self._process.wait_until_ready(START_S)
        except BaseException:
            self._process.close()
            raise
        finally:
            self._reserved.close()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.close()

    @property
    def process(self) -> psutil.Process:
        """Return the server's own process."""
        return self._process.processes[0]

    @property
    def log(self) -> str:
        """Return the end of what the server wrote."""
        return self._process.log_end()

    def signal(self, number: int) -> None:
        """Send a signal to the server and wait for its end."""
        process = self.process
        os.kill(process.pid, number)
        process.wait(60)

    def status(self, key: str | None = None) -> dict[str, Any]:
        """Return `/v1/status`."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        response = httpx.get(f"{self.url}/v1/status", headers=headers, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        status: dict[str, Any] = response.json()
        return status

    def wait_until(self, holds: Callable[[dict[str, Any]], bool], what: str, seconds: float = 60.0) -> dict[str, Any]:
        """Return the first status that holds."""
        deadline = time.monotonic() + seconds
        while not holds(status := self.status()):
            assert time.monotonic() < deadline, f"{what} did not come true in {seconds:.0f} s: {status}"
            time.sleep(0.05)
        return status


def idle(status: dict[str, Any]) -> bool:
    """Return whether no request is waiting or running."""
    return not status["running"] and not status["waiting"]
