"""`structured`: what a grammar costs our server per token."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar

from specache.bench.base import BenchContext, Outcome, Result, check_at_least
from specache.bench.compute_device import CPU
from specache.bench.serve import machine_cores
from specache.bench.serve_client import Answered, LoadJob, send_all
from specache.bench.serve_figures import answer_tokens, percentile
from specache.bench.serve_process import ServerProcess, free_port, pinned
from specache.bench.serve_servers import Served, Server, specache_server
from specache.bench.serve_trace import TraceRequest
from specache.errors import BenchmarkError, ConfigError

QUESTION = "List the towns of a large island as JSON, each with its name, its people, its kind and two words about it."
_TOWN = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "people": {"type": "integer", "minimum": 0, "maximum": 999_999},
        "kind": {"enum": ["harbour", "market", "mine", "fortress"]},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 2, "maxItems": 2},
    },
    "required": ["name", "people", "kind", "words"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": _TOWN, "minItems": 10_000}  # never complete, so that every answer has the same length
# name of a result -> fields of its requests
REQUESTS: dict[str, dict[str, Any]] = {
    "free": {"ignore_eos": True},
    "json schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "towns", "schema": SCHEMA}}},
    "regex": {"regex": "([a-zA-Z ,.']{1,80}\n){120}"},
}


@dataclass(frozen=True, kw_only=True)
class Structured:
    """Answers with and without a grammar, in turn, by one server: the time between their tokens."""

    name: ClassVar[str] = "structured"
    summary: ClassVar[str] = "our server's time per token with a JSON schema or a regex, and without"
    uses_model: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("impl", "clients", "ms_per_token", "spread", "ttft_ms_p50", "vs_free")
    clients: tuple[int, ...] = field(default=(1,), metadata={"help": "Answers at once."})
    answer_tokens: int = field(default=64, metadata={"help": "Tokens of each answer."})
    repeat: int = field(default=5, metadata={"help": "Rounds; each asks for every kind of answer."})
    timeout: float = field(default=600.0, metadata={"help": "Seconds that a request may take, or the server to start."})
    serve_options: str = field(default="", metadata={"help": "Further options of specache serve, in one word."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "clients", "repeat", "timeout")
        check_at_least(self, 2, "answer_tokens")

    def run(self, bench: BenchContext) -> Outcome:
        if os.name != "posix":
            raise BenchmarkError("bench structured starts and ends a server by process group, which this system does not have.")
        if bench.device != CPU:
            raise ConfigError("bench structured measures a server on the CPU. Run it with --device cpu.")
        server_cores, client_core = machine_cores()
        threads = len(server_cores) if server_cores is not None else max(1, (os.cpu_count() or 2) - 1)
        source, options = bench.model_source, tuple(shlex.split(self.serve_options))
        server = specache_server(Served(source.pretrained(), source.weights, threads, max(self.clients), 2048, options))
        port = free_port()
        with ServerProcess(
            server.command(port), port, cores=server_cores, threads=threads, ready_path=server.ready_path, name=server.name
        ) as process:
            process.wait_until_ready(self.timeout)
            with pinned(None if client_core is None else {client_core}):
                results = [result for clients in self.clients for result in self._results(bench, server, process.url, clients)]
        return Outcome(results, {"server_threads": threads, "client_core": client_core, "server": server.about})

    def _results(self, bench: BenchContext, server: Server, url: str, clients: int) -> list[Result]:
        """Ask for every kind of answer in turn, once before the clock runs."""
        samples: dict[str, list[list[Answered]]] = {name: [] for name in REQUESTS}
        for turn in range(self.repeat + 1):
            bench.log(f"{clients} at once: round {turn} of {self.repeat}" + (" (untimed)" if turn == 0 else ""))
            names = list(REQUESTS)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                requests = tuple(
                    TraceRequest(0.0, ({"role": "user", "content": QUESTION},), self.answer_tokens) for _ in range(clients)
                )
                job = LoadJob(url, server.model, requests, clients, self.timeout, fields=REQUESTS[name])
                answers = asyncio.run(send_all(job))
                check(name, answers)
                if turn:
                    samples[name].append(answers)
        times = {name: [_ms_per_token(answers) for answers in rounds] for name, rounds in samples.items()}
        return [_result(name, clients, rounds, times[name], times["free"]) for name, rounds in samples.items()]


def _result(name: str, clients: int, rounds: list[list[Answered]], times: list[float], free: list[float]) -> Result:
    firsts = [answer.first_s * 1e3 for answers in rounds for answer in answers if answer.first_s is not None]
    return {
        "impl": name,
        "clients": clients,
        "ms_per_token": median(times),
        "spread": [percentile(times, 25), percentile(times, 75)],
        "ttft_ms_p50": percentile(firsts, 50),
        "answer_tokens": sum(answer_tokens(answer) for answers in rounds for answer in answers),
        "vs_free": median(ours / theirs for ours, theirs in zip(times, free, strict=True)),
    }


def _ms_per_token(answers: Sequence[Answered]) -> float:
    """Return the time from the first to the last piece of text over the tokens between."""
    return median((one.arrivals[-1] - one.arrivals[0]) * 1e3 / (answer_tokens(one) - 1) for one in answers)


def check(name: str, answers: Sequence[Answered]) -> None:
    """Refuse answers that give no time per token.

    Raises:
        BenchmarkError: says why.
    """
    for answer in answers:
        if answer.error is not None:
            raise BenchmarkError(f"A request ({name}) failed ({answer.error}): {answer.message}")
        if len(answer.arrivals) < 2:
            raise BenchmarkError(f"An answer ({name}) came in one piece: choose more --answer-tokens.")
