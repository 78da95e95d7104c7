"""`specache serve`: one model behind the APIs of OpenAI and Anthropic."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specache import __version__
from specache.cli import cache_options, options
from specache.cli.console import err, reports_errors
from specache.cli.field_command import takes_options
from specache.cli.models import LoadedModel
from specache.cli.serve_options import ServeLoadOptions, ServerOptions
from specache.cli.serving_threads import serving_threads, set_thread_environment
from specache.config import SpeCacheConfig
from specache.errors import ConfigError, SpeCacheError

if TYPE_CHECKING:
    from specache.engine.service import EngineService
    from specache.server.served_model import ServedModel

EPILOG = """
[bold]Examples[/bold]

specache serve -m demo

curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "Once upon a time"}'

python -c "from openai import OpenAI; print(OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none').models.list().data)"

specache serve -m Qwen/Qwen3-0.6B --weights int8 --fast-memory 4GB --prefix-cache ~/prefixes --prefix-bytes 50GB

specache serve -m ./my-model --host 0.0.0.0 --api-key-file keys.txt --slow-tier disk:/var/tmp/rows
"""


@reports_errors
@takes_options
def serve(
    model: options.Model,
    *,
    server: ServerOptions,
    cache: cache_options.CacheOptions,
    loading: ServeLoadOptions,
) -> None:
    """Serve a model over HTTP, with the APIs of OpenAI and Anthropic.

    Requests share the model, the cache and its memory; a prompt is read once for all that begin
    alike. Ctrl-C ends the server.

    docs/server.md lists the addresses and their fields.
    """
    check_installed()
    config, settings, keys = cache.config(), server.settings(), server.keys()
    settings.check_keys(keys is not None)
    threads = loading.threads or serving_threads(settings.is_loopback)
    set_thread_environment(threads)
    loading = dataclasses.replace(loading, threads=threads)
    options.keep_memory_bounded(config)
    log_to_standard_error()

    from specache.server.app import ServerApp
    from specache.server.launch import Server, address_text, listen

    began = time.monotonic()

    def load() -> tuple[ServedModel, EngineService]:
        return _load(model, server, config, loading)

    listener = listen(settings)
    with listener:
        address = address_text(settings, listener)
        _say(f"specache {__version__} listens on {address}/v1 ({threads} thread{'s' * (threads > 1)})")
        if settings.page:
            _say(f"A page to ask it and to watch its memory: {address}/")
        running = Server(
            ServerApp(settings, keys),
            load,
            lambda served: _say(f"{served.names[0]} is ready after {time.monotonic() - began:.1f} s"),
        )
        running.run_until_signal(listener)
    if running.interrupted:
        raise KeyboardInterrupt
    _say("The server has ended.")


def check_installed() -> None:
    """Check that the libraries of the server are there.

    Raises:
        ConfigError: says how to install them.
    """
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the server needs {error.name}, which is not installed. Run: pip install 'specache[serve]'") from None


def log_to_standard_error() -> None:
    """Write the server's log, one line per request, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (("specache.server", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _load(
    model: str, server: ServerOptions, config: SpeCacheConfig, loading: options.LoadOptions
) -> tuple[ServedModel, EngineService]:
    """Load the model and start its engine."""
    loaded = loading.load(model, f"Loading {model}", config)

    from specache.engine.service import EngineService
    from specache.server.served_model import ServedModel

    names = tuple(dict.fromkeys(server.served_model_name or [_public_name(model)]))
    served = ServedModel(loaded.model, loaded.tokenizer, names, loaded.max_positions, _fingerprint(loaded, config))
    prefixes = server.prefix_store(loaded.model, config)
    try:
        service = EngineService(loaded.model, config, prefixes=prefixes, most_waiting=server.max_waiting, chunk_ms=server.chunk_ms)
    except BaseException:
        prefixes.close(0.0)
        raise
    if not service.wait_until_ready():
        raise service.status().error or SpeCacheError("The engine ended while it started.")
    return served, service


def _public_name(model: str) -> str:
    """Return a model's name for clients: a hub name, or a file or folder without its place."""
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model


def _fingerprint(loaded: LoadedModel, config: SpeCacheConfig) -> str:
    """Return a short text that changes with what answers depend on."""
    parts: tuple[Any, ...] = (__version__, loaded.name, loaded.weight_format, sorted(config.to_dict().items(), key=str))
    return f"specache-{hashlib.sha256(repr(parts).encode()).hexdigest()[:10]}"


def _say(message: str) -> None:
    err.print(message, markup=False, soft_wrap=True)
