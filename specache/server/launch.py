"""Run the server: listen first, load the model meanwhile, end cleanly."""

from __future__ import annotations

import asyncio
import importlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from specache.errors import ConfigError
from specache.server.app import ServerApp
from specache.server.connection import connection_class
from specache.server.settings import MOST_HEADER_BYTES, ServerSettings

if TYPE_CHECKING:
    from specache.engine.service import EngineService
    from specache.server.served_model import ServedModel

Load = Callable[[], "tuple[ServedModel, EngineService]"]
_ALWAYS = (signal.SIGINT, signal.SIGTERM)
_SIGNALS = (*_ALWAYS, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_KEEP_ALIVE_SECONDS = 15
_LAST_EVENTS_SECONDS = 10.0  # for streams to send them, beyond the grace of the answers


def listen(settings: ServerSettings) -> socket.socket:
    """Return a socket that clients can connect to.

    Raises:
        ConfigError: the address is in use, or not of this machine.
    """
    try:
        places = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(places, key=lambda place: place[0] != socket.AF_INET)  # of a name with both
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(settings.most_connections)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {settings.host}, port {settings.port}: {reason}. Use another --host or --port."
        ) from None
    return listener


def address_text(settings: ServerSettings, listener: socket.socket) -> str:
    """Return the address that clients use: `http://127.0.0.1:8000`."""
    host, port = settings.host, listener.getsockname()[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{settings.root_path}"


class Server(uvicorn.Server):
    """A server that loads its model in the background.

    Args:
        load: returns the model and its running service.
        on_ready: called once requests are answered.

    Attributes:
        interrupted: whether Ctrl-C ended it.
        failure: the error that ended it, or `None`.
    """

    def __init__(self, app: ServerApp, load: Load, on_ready: Callable[[ServedModel], None] = lambda served: None) -> None:
        settings = app.state.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=connection_class(settings),
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(settings.grace_seconds + _LAST_EVENTS_SECONDS),
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            )
        )
        self.interrupted = False
        self.failure: BaseException | None = None
        self._app = app
        self._load = load
        self._on_ready = on_ready
        self._signals = 0

    def run_until_signal(self, listener: socket.socket) -> None:
        """Serve until Ctrl-C, SIGTERM, SIGHUP or a failure. Takes the listening socket.

        Raises:
            BaseException: the model cannot be loaded.
        """
        asyncio.run(self.serve(sockets=[listener]))
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """End the server soon, from any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End on a signal: answers go on for a moment; on a second one at most for a step."""
        self.interrupted |= sig == signal.SIGINT
        self._signals += 1
        self.should_exit = True
        if self._signals > 1:
            threading.Thread(target=self._close_service, args=(0.0,), daemon=True).start()
        self.force_exit |= self._signals > 2

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take signals in the main thread. They are not raised again at the end.

        SIGHUP, of a closed terminal, is left alone if it is ignored (`nohup`).
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = [number for number in _SIGNALS if number in _ALWAYS or signal.getsignal(number) is not signal.SIG_IGN]
        before: dict[int, Any] = {number: signal.signal(number, self.handle_exit) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and begin to load the model."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._load_model, args=(loop,), name="specache-load", daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, let answers end, send their last events, and free the engine."""
        self._app.state.closing = True
        closing = asyncio.ensure_future(asyncio.to_thread(self._close_service, self._app.state.settings.grace_seconds))
        await super().shutdown(sockets)
        await closing

    def _close_service(self, grace_s: float) -> None:
        service = self._app.state.service
        if service is not None:
            service.close(grace_s)

    def _load_model(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load the model, on a thread of its own."""
        try:
            served, service = self._load()
            served.warm_up()
            importlib.import_module("specache.server.model_routes")  # here: it takes a second
        except BaseException as error:
            self.failure = None if self._app.state.closing else error
            self.should_exit = True
            return
        try:
            loop.call_soon_threadsafe(self._begin_serving, served, service)
        except RuntimeError:  # the loop has ended meanwhile
            service.close(0.0)

    def _begin_serving(self, served: ServedModel, service: EngineService) -> None:
        if self._app.state.closing:
            threading.Thread(target=service.close, args=(0.0,), daemon=True).start()
        else:
            self._app.begin_serving(served, service)
            self._on_ready(served)
