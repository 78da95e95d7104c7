"""The load generator and the processes of `bench serve`, against a small server of the tests."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from specache.bench import serve_figures
from specache.bench.serve_client import Answered, LoadJob, send_all
from specache.bench.serve_figures import Load, figures, percentile, refusal
from specache.bench.serve_process import ServerProcess, free_port
from specache.bench.serve_trace import TraceRequest
from specache.errors import BenchmarkError
from tests.bench import fake_server
from tests.processes import ended

FAKE = Path(fake_server.__file__)


def started(*words: str) -> ServerProcess:
    port = free_port()
    command = [sys.executable, str(FAKE), "--port", str(port), *words]
    return ServerProcess(command, port, cores=None, threads=1, ready_path="/health", name="fake")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with started() as process:
        process.wait_until_ready(30)
        yield process


def ask(server: ServerProcess, *texts: str, clients: int = 8, timeout_s: float = 20.0, at: float = 0.0) -> list[Answered]:
    requests = tuple(TraceRequest(at * index, ({"role": "user", "content": text},), 5) for index, text in enumerate(texts))
    return asyncio.run(send_all(LoadJob(server.url, "m", requests, clients, timeout_s)))


def test_roles_and_comments_are_no_tokens(server):
    (answer,) = ask(server, "late")
    assert answer.error is None and answer.text == "late late late late late "
    assert len(answer.arrivals) == 5 and len(answer.gaps_s) == 4 and answer.first_s >= fake_server.LATE_S
    assert (answer.prompt_tokens, answer.answer_tokens, answer.cached_tokens) == (7, 5, 3)


def test_errors_are_counted_by_their_code_and_the_others_go_on(server):
    answers = ask(server, "status 429", "error", "garbage", "fine", "status 500")
    assert [answer.error for answer in answers] == ["429", "stream", "stream", None, "500"]
    assert "no" in answers[0].message and "out of memory" in answers[1].message
    result = figures([Load(answers, 1, 2)])
    assert result["errors"] == {"429": 1, "stream": 2, "500": 1} and result["completed"] == 1 and result["answer_tokens"] == 5


def test_a_request_that_takes_too_long_is_a_timeout(server):
    (answer,) = ask(server, "hang", timeout_s=1.0)
    assert answer.error == "timeout" and not answer.arrivals


def test_a_server_that_is_not_there_is_a_connection_error():
    job = LoadJob(f"http://127.0.0.1:{free_port()}", "m", (TraceRequest(0, ({"role": "user", "content": "x"},), 1),), 1, 5.0)
    assert asyncio.run(send_all(job))[0].error == "connection"


def test_requests_are_sent_at_their_times_and_at_most_so_many_at_once(server):
    answers = ask(server, *["late"] * 4, clients=2)
    assert sorted(answer.sent for answer in answers)[2] >= min(answer.ended for answer in answers)
    begin = time.perf_counter()
    spaced = ask(server, "a", "b", "c", at=0.2)
    assert all(answer.sent >= begin + 0.2 * index for index, answer in enumerate(spaced))


def test_memory_is_that_of_the_server_and_what_it_started():
    held = 80_000_000
    with started("--hold", str(held)) as process:
        process.wait_until_ready(30)
        deadline = time.monotonic() + 30
        while process.memory().now < held and time.monotonic() < deadline:
            time.sleep(0.05)
        with process.memory() as memory:
            pass
        assert held < memory.peak < held + 100_000_000
        children = process.processes
        assert len(children) == 2
    assert all(map(ended, children))


def test_a_server_that_does_not_start_says_why():
    with started("--fail") as process, pytest.raises(BenchmarkError, match=r"fake ended with exit code 1\. It said: no such model"):
        process.wait_until_ready(30)
    port = free_port()
    command = [sys.executable, "-c", "print('loading', flush=True); import time; time.sleep(60)"]
    slow = ServerProcess(command, port, cores=None, threads=1, ready_path="/", name="slow")
    with slow as process, pytest.raises(BenchmarkError, match=r"slow was not ready after 1 s\. It said: "):
        process.wait_until_ready(1.0)


def test_a_server_that_ignores_being_asked_to_end_is_killed():
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    keeper = "import specache.bench.serve_keeper as k, sys; k.GRACE_S = 0.5; sys.exit(k.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", keeper, sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"up\n"
    process.stdin.close()
    assert process.wait(20) == -signal.SIGKILL % 256


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_server_outlives_the_process_that_measures(ending: signal.Signals):
    program = (
        "import sys, time; from specache.bench.serve_process import ServerProcess, free_port; port = free_port()\n"
        "command = [sys.executable, sys.argv[1], '--port', str(port)]\n"
        "with ServerProcess(command, port, cores=None, threads=1, ready_path='/', name='fake') as process:\n"
        "    process.wait_until_ready(30); print(process.processes[0].pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(FAKE)], stdout=subprocess.PIPE)
    server = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, ending)
    assert parent.wait(30) != 0
    assert ended(server)


def test_percentiles_are_interpolated():
    assert percentile([], 50) is None and percentile([3.0], 99) == 3.0
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5 and percentile(list(range(101)), 99) == 99


def answered(text: str, tokens: int = 5, error: str | None = None) -> Answered:
    return Answered(0.0, [1.0, 1.5, 3.0], 4.0, text, error, None, 10, tokens, 2)


def test_figures_are_those_of_all_requests():
    result = figures([Load([answered("a"), answered("b")], 100, 300), Load([answered("a")], 200, 250)])
    assert result["requests"] == 3 and result["requests_per_min"] == pytest.approx((30 + 15) / 2)
    assert result["tokens_per_s"] == pytest.approx((2.5 + 1.25) / 2) and result["wall_s"] == 4
    assert result["ttft_ms_p50"] == 1000 and result["tbt_ms_p50"] == 1000 and result["tbt_ms_p99"] == 1500
    assert result["cached_tokens"] == 6 and result["prompt_tokens"] == 30
    assert result["idle_bytes"] == 200 and result["peak_bytes"] == 300


def test_servers_that_answer_otherwise_are_not_compared():
    same = Load([answered("The tree is old."), answered("It has forty rings.")], 1, 2)
    near = Load([answered("The tree is old and tall."), answered("Nobody knows.")], 1, 2)
    other = Load([answered("I am another model."), answered("Nobody knows.")], 1, 2)
    longer = Load([answered("The tree is old.", 50), answered("It has forty rings.")], 1, 2)
    failed = Load([answered("The tree is old."), answered("", error="500")], 1, 2)
    assert refusal(same, same) is None and refusal(same, near) is None
    assert "only 0% of its answers begin as ours" in refusal(same, other)
    assert "its answers have 55 tokens, ours 10" in refusal(same, longer)
    assert "1 of its 2 requests" in refusal(same, failed)
    assert serve_figures.alike(failed.answers[1:], same.answers[1:]) is None
