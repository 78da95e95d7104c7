"""`serve`: many clients with shared prefixes ask a server, ours and others."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from specache.bench import serve_client, serve_figures
from specache.bench.base import BenchContext, Outcome, Result, check_at_least
from specache.bench.child import Child
from specache.bench.compute_device import CPU
from specache.bench.gguf_weights import rewrite_gguf
from specache.bench.serve_agent import agent_trace, read_per_new_token
from specache.bench.serve_client import Answered, LoadJob
from specache.bench.serve_figures import Load
from specache.bench.serve_process import ServerProcess, free_port, pinned
from specache.bench.serve_servers import (
    LLAMA_CPP,
    RIVALS,
    TRANSFORMERS,
    Served,
    Server,
    llama_server,
    specache_server,
    transformers_server,
)
from specache.bench.serve_texts import Texts
from specache.bench.serve_trace import Sizes, TraceRequest, check_fits, generated, read_trace
from specache.errors import BenchmarkError, ConfigError

TEMPLATE_TOKENS = 128  # at most, that a chat template adds to a conversation
TURN_TOKENS = 48  # at most, that it adds to a call and its result
WARM_UP = TraceRequest(0.0, ({"role": "user", "content": "Say one word."},), 4)


@dataclass(frozen=True, kw_only=True)
class Serve:
    """A load from a trace against `specache serve` and other servers, one server at a time."""

    name: ClassVar[str] = "serve"
    summary: ClassVar[str] = "many clients with shared prefixes: our server, transformers serve and llama.cpp's"
    uses_model: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        *("impl", "completed", "requests_per_min", "tokens_per_s", "ttft_ms_p50", "ttft_ms_p99", "tbt_ms_p50", "tbt_ms_p99"),
        *(
            "cached_tokens",
            "prompt_tokens",
            "read_per_new_token",
            "peak_bytes",
            "alike",
            "vs_no_sharing",
            "vs_transformers",
            "vs_llama_cpp",
        ),
    )
    against: tuple[str, ...] = field(default=(), metadata={"help": "Other servers: transformers, llama.cpp."})
    no_sharing: bool = field(default=False, metadata={"help": "Also measure our server without prefix sharing."})
    trace: Path | None = field(
        default=None, metadata={"help": "Requests: ShareGPT's .json, or JSON lines of a trace. Default: generated."}
    )
    requests: int = field(default=16, metadata={"help": "How many to send, or to read from the trace."})
    clients: int = field(default=16, metadata={"help": "Most requests at once; a later one waits."})
    rate: float = field(default=0.0, metadata={"help": "Arrivals per second on average (Poisson); 0: all at once."})
    prefixes: int = field(default=1, metadata={"help": "Documents that the requests share, in turn; 0: none."})
    prefix_tokens: int = field(default=6000, metadata={"help": "Tokens of a shared document."})
    prompt_tokens: int = field(default=40, metadata={"help": "Tokens of a request's own text after the document."})
    answer_tokens: int = field(default=32, metadata={"help": "Most tokens of an answer."})
    agent_turns: int = field(
        default=0,
        metadata={
            "help": "Turns of one agent with tools, in place of clients. It asks --prefix-tokens; a turn adds --prompt-tokens."
        },
    )
    repeat: int = field(default=1, metadata={"help": "Runs of each server, each with a new process; they take turns."})
    timeout: float = field(default=1800.0, metadata={"help": "Seconds that a request may take, or a server to start."})
    llama_server: Path | None = field(default=None, metadata={"help": "llama.cpp's llama-server. Default: the one on the PATH."})
    serve_options: str = field(default="", metadata={"help": "Further options of specache serve, in one word."})

    def __post_init__(self) -> None:
        check_at_least(self, 1, "requests", "clients", "prompt_tokens", "answer_tokens", "repeat", "timeout")
        check_at_least(self, 0, "rate", "prefixes", "prefix_tokens", "agent_turns")
        if self.agent_turns and self.trace is not None:
            raise ConfigError("--agent-turns generates its requests. Leave --trace out.")
        unknown = [name for name in self.against if name not in RIVALS]
        if unknown:
            raise ConfigError(f"--against takes {', '.join(RIVALS)}, got {', '.join(unknown)}.")

    def run(self, bench: BenchContext) -> Outcome:
        if os.name != "posix":
            raise BenchmarkError("bench serve starts and ends servers by process group, which this system does not have.")
        if bench.device != CPU:
            raise ConfigError("bench serve compares servers on the CPU. Run it with --device cpu.")
        source = bench.model_source
        model = source.pretrained()
        server_cores, client_core = machine_cores()
        trace, positions = self._trace(model, bench.seed)
        threads = len(server_cores) if server_cores is not None else max(1, (os.cpu_count() or 2) - 1)
        served = Served(model, source.weights, threads, self._clients, positions, tuple(shlex.split(self.serve_options)))
        with tempfile.TemporaryDirectory(prefix="specache-serve-") as folder:
            servers, skipped = self._servers(served, source.gguf, Path(folder))
            loads: dict[Server, list[Load]] = {server: [] for server in servers}
            for turn in range(self.repeat):
                for server in (*servers[turn % len(servers) :], *servers[: turn % len(servers)]):
                    bench.log(f"{server.name}: run {turn + 1} of {self.repeat}")
                    loads[server].append(self._load(server, trace, server_cores, client_core, threads))
        details = {
            "server_cores": None if server_cores is None else sorted(server_cores),
            "client_core": client_core,
            "server_threads": threads,
            "servers": {server.name: server.about for server in servers},
        }
        results = _results(loads)
        if self.agent_turns:
            for result, runs in zip(results, loads.values(), strict=True):
                result["read_per_new_token"] = read_per_new_token(runs[0].answers)
        refused = {result["impl"]: result["not_compared"] for result in results if result.get("not_compared")}
        return Outcome([*results, *skipped], {**details, **({"not_compared": refused} if refused else {})})

    def _trace(self, model: str, seed: int) -> tuple[list[TraceRequest], int]:
        """Return the requests, and the positions that the longest one needs."""
        from transformers import AutoConfig, AutoTokenizer

        texts = Texts(AutoTokenizer.from_pretrained(model), seed)
        if self.agent_turns:
            trace = agent_trace(self.agent_turns, self.prefix_tokens, self.prompt_tokens, self.answer_tokens, texts)
        elif self.trace is not None:
            limits: dict[str, Any] = {"requests": self.requests, "rate": self.rate, "answer_tokens": self.answer_tokens}
            trace = read_trace(self.trace, texts, seed=seed, **limits)
        else:
            lengths = (self.prefixes, self.prefix_tokens, self.prompt_tokens, self.answer_tokens)
            trace = generated(Sizes(self.requests, self.rate, *lengths), texts, seed)
        config = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
        longest = check_fits(trace, texts, getattr(config, "max_position_embeddings", None))
        return trace, longest + TEMPLATE_TOKENS + TURN_TOKENS * self.agent_turns

    @property
    def _clients(self) -> int:
        """Return the most requests at once. An agent waits for each answer."""
        return 1 if self.agent_turns else self.clients

    def _servers(self, served: Served, gguf: str | None, folder: Path) -> tuple[list[Server], list[Result]]:
        """Return the servers, ours first, and a result per server that cannot be measured."""
        servers, skipped = [specache_server(served)], []
        if self.no_sharing:
            servers.append(specache_server(served, sharing=False))
        for name in self.against:
            try:
                servers.append(transformers_server(served) if name == TRANSFORMERS else self._llama(served, gguf, folder))
            except BenchmarkError as error:
                skipped.append({"impl": name, "requests": self.requests, "skipped": str(error)})
        return servers, skipped

    def _llama(self, served: Served, gguf: str | None, folder: Path) -> Server:
        """Return llama.cpp's server over a file with the same weights."""
        if gguf is None:
            raise BenchmarkError(f"{LLAMA_CPP} reads .gguf files, and {served.model} is none.")
        file = folder / "model.gguf"
        server = llama_server(served, file, self.llama_server)
        rewrite_gguf(Path(gguf), str(served.weights), file)
        return server

    def _load(
        self, server: Server, trace: Sequence[TraceRequest], cores: set[int] | None, client_core: int | None, threads: int
    ) -> Load:
        """Start a server, warm it up, send the trace, and end it."""
        port = free_port()
        with ServerProcess(
            server.command(port), port, cores=cores, threads=threads, ready_path=server.ready_path, name=server.name
        ) as process:
            process.wait_until_ready(self.timeout)
            job = LoadJob(process.url, server.model, (WARM_UP,), 1, self.timeout, client_core)
            warm = _answers(job)[0]
            if warm.error is not None:
                raise BenchmarkError(
                    f"{server.name} failed on its first request ({warm.error}): {warm.message}. {process.log_end()}"
                )
            with pinned(None if client_core is None else {client_core}), process.memory() as memory:
                idle = memory.now
                answers = _answers(replace(job, requests=tuple(trace), clients=self._clients))
            return Load(answers, idle, memory.peak)


def _answers(job: LoadJob) -> list[Answered]:
    with closing(Child(serve_client.serve, job)) as child:
        answers: list[Answered] = child.receive()
        return answers


def machine_cores() -> tuple[set[int] | None, int | None]:
    """Return the cores of the server, and the core of the load generator.

    Both are `None` if the machine has one core, or the system does not pin processes.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None, None
    cores = sorted(os.sched_getaffinity(0))
    return (set(cores[:-1]), cores[-1]) if len(cores) > 1 else (None, None)


def _results(loads: dict[Server, list[Load]]) -> list[Result]:
    """Return the figures of each server, ours compared with those that answered alike."""
    (_, our_loads), *others = loads.items()
    ours: Result = {"impl": next(iter(loads)).name, **serve_figures.figures(our_loads)}
    results = [ours]
    for server, theirs in others:
        result = {"impl": server.name, **serve_figures.figures(theirs)}
        result["alike"] = serve_figures.alike(our_loads[0].answers, theirs[0].answers)
        reasons = [why for one, other in zip(our_loads, theirs, strict=True) if (why := serve_figures.refusal(one, other))]
        result["not_compared"] = reasons[0] if reasons else None
        if not reasons:
            ours.update(serve_figures.compare(ours, result, _key(server.name)))
        results.append(result)
    return results


def _key(name: str) -> str:
    return name.replace(" ", "_").replace(".", "_").replace("-", "_")
