"""Options of `specache serve` about the server itself."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specache.cli.byte_sizes import parse_size
from specache.cli.options import MODEL_PANEL, LoadOptions
from specache.errors import ConfigError
from specache.platform import machine

if TYPE_CHECKING:
    from specache.config import SpeCacheConfig
    from specache.engine.prefix_store import PrefixStore
    from specache.server.keys import KeyRing
    from specache.server.settings import ServerSettings

SERVER_PANEL = "Server"
PREFIX_PANEL = "Stored prompts"
RESPONSE_PANEL = "Stored responses"
ACCESS_PANEL = "Who may use it"
LIMITS_PANEL = "Limits"
DEFAULT_PREFIX_BYTES = "50GB"

Host = Annotated[
    str,
    typer.Option(
        "--host",
        help="Address to listen on. Any but 127.0.0.1 needs --api-key-file.",
        metavar="ADDRESS",
        rich_help_panel=SERVER_PANEL,
    ),
]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=SERVER_PANEL)]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name",
        help="Name of the model in requests. May be given several times. Default: that of --model, without folders.",
        metavar="NAME",
        rich_help_panel=SERVER_PANEL,
    ),
]
RootPath = Annotated[
    str,
    typer.Option(
        "--root-path", help="Prefix of all addresses behind a reverse proxy.", metavar="PATH", rich_help_panel=SERVER_PANEL
    ),
]
Page = Annotated[
    bool, typer.Option("--page/--no-page", help="A page at / to chat and to watch the memory.", rich_help_panel=SERVER_PANEL)
]
ChunkMs = Annotated[
    float,
    typer.Option(
        "--chunk-ms",
        min=1.0,
        help="How long other answers may wait while a part of a prompt is read. Its length is chosen at the start.",
        rich_help_panel=SERVER_PANEL,
    ),
]
PrefixCache = Annotated[
    Path | None,
    typer.Option(
        "--prefix-cache",
        help="Keep read prompts in this folder too: they outlive the server, and those that memory has no room for.",
        metavar="DIR",
        rich_help_panel=PREFIX_PANEL,
    ),
]
PrefixBytes = Annotated[
    str | None,
    typer.Option(
        "--prefix-bytes",
        help=f"Limit of that folder. Default: {DEFAULT_PREFIX_BYTES}.",
        metavar="BYTES",
        rich_help_panel=PREFIX_PANEL,
    ),
]
SlowMemory = Annotated[
    str | None,
    typer.Option(
        "--slow-memory",
        help="Limit of main memory for the 16-bit pairs of running and stored prompts, beyond which stored ones go. "
        "Default: half of what is free once the model is loaded.",
        metavar="BYTES",
        rich_help_panel=PREFIX_PANEL,
    ),
]
PrefixSharing = Annotated[
    bool,
    typer.Option(
        "--prefix-sharing/--no-prefix-sharing",
        help="Keep what was read of prompts for later ones that begin alike.",
        rich_help_panel=PREFIX_PANEL,
    ),
]
ResponseBytes = Annotated[
    str,
    typer.Option(
        "--response-bytes",
        help="Main memory for stored responses (/v1/responses). Beyond it, those of the key that holds most go first.",
        metavar="BYTES",
        rich_help_panel=RESPONSE_PANEL,
    ),
]
ResponseAge = Annotated[
    float,
    typer.Option(
        "--response-age",
        min=0.001,
        help="Hours that a response is stored. None outlives the server.",
        metavar="HOURS",
        rich_help_panel=RESPONSE_PANEL,
    ),
]
Grace = Annotated[
    float,
    typer.Option("--grace", min=0.0, help="Seconds that answers may go on after Ctrl-C.", rich_help_panel=SERVER_PANEL),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="Require a key: one per line, 'KEY' or 'NAME:KEY', in a file that only you can read (mode 0600).",
        metavar="FILE",
        rich_help_panel=ACCESS_PANEL,
    ),
]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        help="A further name of this server, as a reverse proxy passes it on. May be given several times.",
        metavar="NAME",
        rich_help_panel=ACCESS_PANEL,
    ),
]
SharePrefixes = Annotated[
    bool,
    typer.Option(
        "--share-prefixes",
        help="Let all keys share stored prefixes. One can then find out by time what another has asked.",
        rich_help_panel=ACCESS_PANEL,
    ),
]
DefaultNewTokens = Annotated[
    int,
    typer.Option(
        "--default-new-tokens",
        min=1,
        help="Longest answer to a chat request that names no limit, in tokens.",
        rich_help_panel=LIMITS_PANEL,
    ),
]
MaxPromptTokens = Annotated[
    int | None,
    typer.Option(
        "--max-prompt-tokens", min=1, help="Longest prompt. Default: what the model can read.", rich_help_panel=LIMITS_PANEL
    ),
]
HeaderTimeout = Annotated[
    float, typer.Option("--header-timeout", min=0.1, help="Seconds that headers may take to arrive.", rich_help_panel=LIMITS_PANEL)
]
BodyTimeout = Annotated[
    float, typer.Option("--body-timeout", min=0.1, help="Seconds that a body may take to arrive.", rich_help_panel=LIMITS_PANEL)
]
MaxBody = Annotated[
    str, typer.Option("--max-body", help="Longest body of a request.", metavar="BYTES", rich_help_panel=LIMITS_PANEL)
]
MaxWaiting = Annotated[
    int,
    typer.Option("--max-waiting", min=1, help="Requests that may wait; more are told to try later.", rich_help_panel=LIMITS_PANEL),
]
MaxRequests = Annotated[
    int,
    typer.Option(
        "--max-requests", min=1, help="Requests for answers, and to /tokenize, that may be open.", rich_help_panel=LIMITS_PANEL
    ),
]
MaxConnections = Annotated[
    int, typer.Option("--max-connections", min=1, help="Connections that may be open.", rich_help_panel=LIMITS_PANEL)
]


ServingThreads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="CPU threads. Default: the cores less one (at least 1), which is left to clients; all of them with another --host.",
        show_default=False,
        rich_help_panel=MODEL_PANEL,
    ),
]


def check_writable(folder: Path, flag: str) -> None:
    """Make a folder if there is none, and check that files can be written in it.

    Raises:
        ConfigError: says why not, and what to do.
    """
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} {folder}: no files can be written there ({error.strerror}). Name a folder on a disk that you may write to, "
            f"or leave out {flag}."
        ) from None


@dataclass(frozen=True, kw_only=True)
class ServeLoadOptions(LoadOptions):
    """How the model is loaded, with the threads of a server."""

    threads: ServingThreads = None


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the server listens, whom it serves, and its limits."""

    host: Host = "127.0.0.1"
    port: Port = 8000
    served_model_name: ServedModelName = None
    root_path: RootPath = ""
    page: Page = True
    chunk_ms: ChunkMs = 250.0
    prefix_sharing: PrefixSharing = True
    prefix_cache: PrefixCache = None
    prefix_bytes: PrefixBytes = None
    slow_memory: SlowMemory = None
    response_bytes: ResponseBytes = "256MiB"
    response_age: ResponseAge = 24.0
    grace: Grace = 2.0
    api_key_file: ApiKeyFile = None
    allowed_host: AllowedHost = None
    share_prefixes: SharePrefixes = False
    default_new_tokens: DefaultNewTokens = 4096
    max_prompt_tokens: MaxPromptTokens = None
    max_body: MaxBody = "16MiB"
    max_waiting: MaxWaiting = 64
    max_requests: MaxRequests = 128
    max_connections: MaxConnections = 512
    header_timeout: HeaderTimeout = 10.0
    body_timeout: BodyTimeout = 60.0

    def settings(self) -> ServerSettings:
        """Return the settings of the server.

        Raises:
            ConfigError: a value is invalid.
        """
        from specache.server.settings import ServerSettings

        for size, flag in ((self.prefix_bytes, "--prefix-bytes"), (self.slow_memory, "--slow-memory")):
            if size is not None:
                parse_size(size, flag)
        self._check_together()
        if self.prefix_cache is not None:
            check_writable(self.prefix_cache, "--prefix-cache")

        return ServerSettings(
            host=self.host,
            port=self.port,
            root_path=self.root_path,
            allowed_hosts=tuple(self.allowed_host or ()),
            page=self.page,
            share_prefixes=self.share_prefixes,
            prefix_sharing=self.prefix_sharing,
            default_new_tokens=self.default_new_tokens,
            most_prompt_tokens=self.max_prompt_tokens,
            most_body_bytes=parse_size(self.max_body, "--max-body"),
            most_streams=self.max_requests,
            most_connections=self.max_connections,
            most_response_bytes=parse_size(self.response_bytes, "--response-bytes"),
            response_age_seconds=self.response_age * 3600,
            header_seconds=self.header_timeout,
            body_seconds=self.body_timeout,
            grace_seconds=self.grace,
        )

    def _check_together(self) -> None:
        """Refuse options that would be without effect beside the others, and an empty name.

        Raises:
            ConfigError: says which to leave out.
        """
        about_stored = {
            "--prefix-cache": self.prefix_cache is not None,
            "--prefix-bytes": self.prefix_bytes is not None,
            "--share-prefixes": self.share_prefixes,
        }
        for flag, given in about_stored.items():
            if given and not self.prefix_sharing:
                raise ConfigError(f"{flag} is about prompts that are stored for later ones; leave out --no-prefix-sharing.")
        if self.prefix_bytes is not None and self.prefix_cache is None:
            raise ConfigError("--prefix-bytes limits the folder of --prefix-cache DIR, which is missing (--slow-memory: memory).")
        if not all(self.served_model_name or []):
            raise ConfigError("--served-model-name is empty. Requests name the model by it: pass a name, or leave it out.")

    def prefix_store(self, model: Any, config: SpeCacheConfig) -> PrefixStore:
        """Return the store of prompts that were read, which also bounds the rows of running ones.

        Without prefix sharing no request leaves anything in it.

        Raises:
            ConfigError, SessionError: a size is none, or the folder cannot be used.
        """
        from specache.engine.prefix_store import PrefixStore

        return PrefixStore(
            model,
            config,
            most_slow_bytes=self._most_slow_bytes(),
            folder=self.prefix_cache,
            most_disk_bytes=parse_size(self.prefix_bytes or DEFAULT_PREFIX_BYTES, "--prefix-bytes"),
        )

    def _most_slow_bytes(self) -> int | None:
        if self.slow_memory is not None:
            return parse_size(self.slow_memory, "--slow-memory")
        free = machine.available_memory()
        return None if free is None else free // 2

    def keys(self) -> KeyRing | None:
        """Return the keys, or `None` if there is no key file.

        Raises:
            ConfigError: the file cannot be used.
        """
        from specache.server.keys import KeyRing

        return None if self.api_key_file is None else KeyRing.load(self.api_key_file)
