"""`specache serve`: what it refuses at once, and a real process from its start to its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from specache.cli.serving_threads import serving_threads, set_thread_environment
from tests.cli.running import one_line, run
from tests.server.live_server import wait_until
from tests.server.real_server import START_S

HELLO = [{"role": "user", "content": "Hello"}]
BODY = {"messages": HELLO, "max_tokens": 12_000, "temperature": 0, "stream": True, "ignore_eos": True}  # still runs at a signal


class Process:
    """A server process."""

    def __init__(self, log: Path, *arguments: str | Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "specache.cli.main", "serve", "--port", "0", *map(str, arguments)]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "COLUMNS": "200"})

    def wait_for(self, text: str) -> str:
        """Wait until the log has a text, and return it."""
        wait_until(lambda: text in self.log.read_text() or self.process.poll() is not None, START_S)
        seen = self.log.read_text()
        assert text in seen, seen
        return seen

    @property
    def address(self) -> str:
        return self.wait_for("listens on ").split("listens on ")[1].split("/v1")[0]

    def ask(self, path: str, body: object = None, **headers: str) -> urllib.request.addinfourl:
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(
            urllib.request.Request(self.address + path, data, {"Content-Type": "application/json", **headers}), timeout=60
        )

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(log: Path, *arguments: str | Path) -> Iterator[Process]:
    started = Process(log, *arguments)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


def test_ctrl_c_ends_a_stream_with_a_last_event_and_the_process_with_130(tmp_path, long_folder):
    with serving(
        tmp_path / "log", "-m", long_folder, "--grace", "0", "--dtype", "float32", "--served-model-name", "mine"
    ) as server:
        seen = server.wait_for("mine is ready")
        assert seen.index("listens on http://127.0.0.1:") < seen.index("mine is ready")
        assert f"watch its memory: {server.address}/" in seen
        with server.ask("/") as page:
            assert b"<title>specache</title>" in page.read()
        assert f"({serving_threads(clients_are_here=True)} thread" in seen
        assert json.load(server.ask("/v1/models"))["data"][0]["id"] == "mine"
        with server.ask("/v1/chat/completions", BODY) as stream:
            first = [stream.readline() for _ in range(8)]
            assert any(line.startswith(b"data: ") for line in first)
            server.process.send_signal(signal.SIGINT)
            events = [line.removeprefix(b"data: ") for line in stream.read().splitlines() if line.startswith(b"data: ")]
        assert json.loads(events[-1])["error"]["code"] == "shutting_down"
        assert server.process.wait(60) == 130
        lines = server.log.read_text()
        assert "POST /v1/chat/completions 200" in lines and "ended=aborted" in lines
        assert "Traceback" not in lines and "Hello" not in lines


def test_sigterm_ends_a_server_with_keys_and_code_0(tmp_path, tiny_folder):
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{'a' * 24}\n")
    keys.chmod(0o600)
    stored = tmp_path / "prefixes"
    arguments = ("-m", tiny_folder, "--api-key-file", keys, "--prefix-cache", stored, "--prefix-bytes", "1GB", "--host", "0.0.0.0")
    with serving(tmp_path / "log", *arguments) as server:
        server.wait_for("is ready")
        address = server.address.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/v1/models", timeout=60)
        assert refused.value.code == 401
        key = {"Authorization": f"Bearer {'a' * 24}"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/models", headers=key), timeout=60) as answer:
            assert json.load(answer)["data"][0]["id"] == tiny_folder.name
        assert server.end(signal.SIGTERM) == 0
        lines = server.log.read_text()
        assert "The server has ended." in lines and "Traceback" not in lines and "a" * 24 not in lines


def test_a_closed_terminal_ends_a_server_as_sigterm_does(tmp_path, tiny_folder):
    with serving(tmp_path / "log", "-m", tiny_folder) as server:
        server.wait_for("is ready")
        assert server.end(signal.SIGHUP) == 0
        lines = server.log.read_text()
        assert "The server has ended." in lines and "Traceback" not in lines


def test_ctrl_c_while_the_model_is_loaded_ends_the_process(tmp_path, tiny_folder):
    with serving(tmp_path / "log", "-m", tiny_folder) as server:
        wait_until(lambda: _health(server.address) == 503)
        assert server.end(signal.SIGINT) == 130


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(tmp_path):
    with serving(tmp_path / "log", "-m", tmp_path) as server:
        assert server.process.wait(START_S) == 1
        assert "error: cannot load a model" in server.log.read_text()


def _health(address: str) -> int:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=60).status  # imports may hold up the server's other threads
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def refused(*arguments: str | Path) -> str:
    return one_line(run("serve", "-m", "no-such-model", *arguments, code=2).stderr)


def test_another_host_is_refused_without_keys():
    assert "--api-key-file" in refused("--host", "0.0.0.0")


def test_libraries_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "uvicorn" in refused() and "specache[serve]" in refused()


def test_a_key_file_that_others_may_read_is_refused(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a" * 30)
    keys.chmod(0o644)
    assert "chmod 600" in refused("--api-key-file", keys)


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in refused("--port", str(port))


def test_a_folder_of_prompts_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "prefixes", "/proc/prefixes"):
        message = refused("--prefix-cache", folder)
        assert str(folder) in message and "Name a folder" in message


def test_fast_memory_too_small_for_any_request_ends_the_server_with_the_numbers(tmp_path, tiny_folder):
    with serving(tmp_path / "log", "-m", tiny_folder, "--fast-memory", "20KB") as server:
        assert server.process.wait(START_S) == 1
        lines = server.log.read_text()
        assert "20,000 bytes" in lines and "no request would fit" in lines and "Traceback" not in lines


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--root-path", "llm"), "root_path"),
        (("--max-body", "much"), "--max-body"),
        (("--prefix-bytes", "x"), "--prefix-bytes"),
        (("--slow-memory", "x"), "--slow-memory"),
        (("--prefix-cache", "d", "--no-prefix-sharing"), "--prefix-cache"),
        (("--prefix-bytes", "1GB", "--no-prefix-sharing"), "leave out --no-prefix-sharing"),
        (("--share-prefixes", "--no-prefix-sharing"), "leave out --no-prefix-sharing"),
        (("--prefix-bytes", "1GB"), "--prefix-cache DIR, which is missing"),
        (("--served-model-name", ""), "--served-model-name is empty"),
        (("--bits", "3"), "--bits"),
        (("--host", "not a host"), "cannot listen"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_model_is_loaded(tmp_path, arguments, part):
    keys = tmp_path / "keys"
    keys.write_text("a" * 30)
    keys.chmod(0o600)
    assert part in refused(*arguments, "--api-key-file", keys)


def test_one_core_is_left_to_clients_on_this_machine(monkeypatch):
    cores = serving_threads(clients_are_here=False)
    assert serving_threads(clients_are_here=True) == max(1, cores - 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    set_thread_environment(3)
    assert os.environ["OMP_NUM_THREADS"] == "3" and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    set_thread_environment(3)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
