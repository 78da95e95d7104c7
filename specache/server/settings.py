"""The settings of the server: where it listens, whom it serves, and its limits."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from specache.errors import ConfigError

MOST_HEADER_BYTES = 32 * 1024  # of one request
MOST_HEADERS = 100
_LOCALHOST = "localhost"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What `specache serve` is told, apart from the model and its cache.

    Attributes:
        host, port: where it listens. Port 0 takes a free one.
        root_path: the prefix of all addresses behind a reverse proxy, such as `/llm`.
        allowed_hosts: further names in a request's Host header.
        page: whether there is a page at `/`.
        share_prefixes: whether all keys share stored prefixes.
        prefix_sharing: whether prefixes are stored at all.
        default_new_tokens: the longest answer of a chat request that names no limit.
        most_prompt_tokens: the longest prompt, in tokens; `None` is what the model can read.
        most_body_bytes: the longest body of a request.
        most_messages: the most messages of a conversation, and parts of a message.
        most_prompts, most_answers: the most prompts of a request, and answers (`n`) to each.
        most_streams: requests for answers, and for the tokens of texts, that may be open at once.
        most_connections: connections that may be open at once.
        most_response_bytes: the memory of stored responses, of all keys together.
        response_age_seconds: how long a response is stored.
        header_seconds, body_seconds: how long a client may take to send either.
        drain_seconds: how long the rest of a body is read that was answered before its end.
        send_seconds: how long a client may leave an event of its stream unread.
        ping_seconds: the pause after which a silent stream gets a comment.
        grace_seconds: how long answers may go on after Ctrl-C.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    root_path: str = ""
    allowed_hosts: tuple[str, ...] = ()
    page: bool = True
    share_prefixes: bool = False
    prefix_sharing: bool = True
    default_new_tokens: int = 4096
    most_prompt_tokens: int | None = None
    most_body_bytes: int = 16 * 2**20
    most_messages: int = 4096
    most_prompts: int = 128
    most_answers: int = 16
    most_streams: int = 128
    most_connections: int = 512
    most_response_bytes: int = 256 * 2**20
    response_age_seconds: float = 24 * 3600.0
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    drain_seconds: float = 2.0
    send_seconds: float = 60.0
    ping_seconds: float = 10.0
    grace_seconds: float = 2.0

    def __post_init__(self) -> None:
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise ConfigError(f"root_path must be a path such as /llm, without a slash at its end; got {self.root_path!r}.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be a number from 0 to 65535, got {self.port}.")
        for name, value in vars(self).items():
            limit = name.startswith(("most_", "default_")) or name.endswith("_seconds")
            if limit and value is not None and not value > 0 and name != "grace_seconds":
                raise ConfigError(f"{name} must be above 0, got {value}.")
        if self.grace_seconds < 0:
            raise ConfigError(f"grace_seconds must be 0 or more, got {self.grace_seconds}.")

    @property
    def is_loopback(self) -> bool:
        """Return whether only programs on this machine can reach the server."""
        address = address_of(self.host)
        return self.host == _LOCALHOST or (address is not None and address.is_loopback)

    def check_keys(self, has_keys: bool) -> None:
        """Refuse to listen to other machines without keys.

        Raises:
            ConfigError: says what to do.
        """
        if not self.is_loopback and not has_keys:
            raise ConfigError(
                f"--host {self.host} lets other machines use this model, and there are no keys. Pass --api-key-file FILE "
                "(one key per line, mode 0600), or leave --host at 127.0.0.1."
            )


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return a host as an address; `None` if it is a name. `[::1]` is `::1`."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
