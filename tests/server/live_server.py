"""A server behind real sockets: in a thread of this process, with a tiny model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from specache import SpeCacheConfig
from specache.engine.service import EngineService
from specache.server.app import ServerApp
from specache.server.keys import KeyRing
from specache.server.launch import Server, listen
from specache.server.settings import ServerSettings
from tests.server.tiny_server import NAME, SHORT, TOKENIZER, printable_model, served_model


@dataclass
class Live:
    """A running server."""

    app: ServerApp
    server: Server
    service: EngineService
    port: int
    thread: threading.Thread

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=100)


@contextmanager
def live(
    *,
    keys: dict[str, str] | None = None,
    config: SpeCacheConfig = SHORT,
    model: Any = None,
    tokenizer: Any = TOKENIZER,
    names: tuple[str, ...] = (NAME,),
    service: Any = None,
    **settings: Any,
) -> Iterator[Live]:
    """Yield a server that has loaded its model, and end it after the block."""
    model = printable_model() if model is None else model
    chosen = ServerSettings(port=0, **settings)
    app = ServerApp(chosen, None if keys is None else KeyRing(keys))
    engine = EngineService(model, config, **(service or {}))
    assert engine.wait_until_ready(60)
    listener = listen(chosen)
    server = Server(app, lambda: (served_model(model, tokenizer, names), engine))
    thread = threading.Thread(target=server.run_until_signal, args=(listener,))
    thread.start()
    try:
        wait_until(lambda: app.state.served is not None)
        yield Live(app, server, engine, listener.getsockname()[1], thread)
    finally:
        server.stop()
        thread.join(100)
        assert not thread.is_alive()
        listener.close()


def wait_until(condition: Any, seconds: float = 100.0) -> None:
    """Wait for a condition, and fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def received(connection: socket.socket) -> bytes:
    """Return everything until the other side closes."""
    data = b""
    while True:
        try:
            block = connection.recv(65536)
        except ConnectionResetError:
            return data
        if not block:
            return data
        data += block


def received_until(connection: socket.socket, end: bytes) -> bytes:
    """Return everything until these bytes have come: headers, events and bodies may come apart."""
    data = b""
    while end not in data:
        block = connection.recv(65536)
        assert block, f"the other side closed before {end!r} came: {data!r}"
        data += block
    return data


def request(path: str, body: bytes = b"", headers: str = "", length: int | None = None) -> bytes:
    """Return the bytes of a POST request."""
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n{headers}\r\n"
    return head.encode() + body
