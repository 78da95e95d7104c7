"""What a request must be before a route sees it: for this server, from no web page, with a key."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specache.server.dialects import path_without_root
from specache.server.error_responses import ApiError, error_response, headers_too_large
from specache.server.request_context import RequestContext
from specache.server.settings import MOST_HEADER_BYTES, MOST_HEADERS, ServerSettings, address_of

if TYPE_CHECKING:
    from specache.server.keys import KeyRing

OPEN_TO_ALL = frozenset({"/", "/health"})  # paths that need no key
_WITH_BODY = ("POST", "PUT", "PATCH")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


class Guard:
    """Refuses what is not for this server, then limits the bytes and the time of the body."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, keys: KeyRing | None) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            _check_headers(headers)
            check_host(headers, self._settings)
            check_origin(headers)
            RequestContext.of(scope).owner = self._owner(scope, headers)
            self._check_body(scope, headers)
        except ApiError as error:
            await error_response(error, RequestContext.of(scope))(scope, receive, send)
            return
        await self._app(scope, BoundedBody(receive, self._settings), send)

    def _owner(self, scope: Scope, headers: Headers) -> str:
        if self._keys is None or path_without_root(scope["path"], self._settings.root_path) in OPEN_TO_ALL:
            return ""
        presented = headers.get("x-api-key")
        kind, _, credentials = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            presented = credentials.strip()
        if not presented:
            raise _refused_key("This server needs a key: send 'Authorization: Bearer KEY', or 'x-api-key: KEY'.")
        owner = self._keys.owner(presented)
        if owner is None:
            raise _refused_key("This key is not known here.")
        return owner

    def _check_body(self, scope: Scope, headers: Headers) -> None:
        if "content-length" in headers and "transfer-encoding" in headers:  # proxies differ in which they believe
            message = "Send Content-Length or Transfer-Encoding, not both."
            raise ApiError(400, message, code="bad_request", headers={"Connection": "close"})
        if scope["method"] in _WITH_BODY:
            _check_content_type(headers)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._settings.most_body_bytes:
            raise _too_long(self._settings)


class BoundedBody:
    """A `receive` that refuses bodies which are too long or too slow."""

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self._receive = receive
        self._settings = settings
        self._bytes = 0
        self._complete = False
        self._deadline = time.monotonic() + settings.body_seconds

    async def __call__(self) -> Message:
        if self._complete:  # what comes now is the end of the connection, in its own time
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            raise ApiError(
                408,
                f"The body did not arrive within {self._settings.body_seconds:g} seconds.",
                code="body_timeout",
                headers={"Connection": "close"},
            ) from None
        self._bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._bytes > self._settings.most_body_bytes:
            raise _too_long(self._settings)
        return message


def check_host(headers: Headers, settings: ServerSettings) -> None:
    """Refuse names that are not this server's: a web page may have any name lead here (rebinding).

    Addresses are no names, so a server that other machines reach takes any of them.

    Raises:
        ApiError: 403.
    """
    values = headers.getlist("host")
    host = _hostname(values[0]) if len(values) == 1 else None
    if host is None:
        raise ApiError(400, "The request needs one Host header.", code="bad_host")
    allowed = (_hostname(name) or name.lower() for name in settings.allowed_hosts)  # given with a port or without
    if host in {"localhost", settings.host.lower(), *allowed}:
        return
    address = address_of(host)
    if address is not None and (address.is_loopback or not settings.is_loopback):
        return
    raise ApiError(
        403, "The Host header names another server. Start this one with --allowed-host NAME if the name is meant.", code="bad_host"
    )


def check_origin(headers: Headers) -> None:
    """Refuse requests of web pages that this server did not send.

    Raises:
        ApiError: 403.
    """
    origin = headers.get("origin")
    foreign = origin is not None and not _same_place(origin, headers.get("host", ""))
    mode = headers.get("sec-fetch-mode")
    if foreign or (headers.get("sec-fetch-site") == "cross-site" and mode != "navigate"):
        raise ApiError(403, "Requests of other web pages are refused.", code="foreign_origin")


def _same_place(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _hostname(value: str) -> str | None:
    """Return the host of a Host header, in lower case and without its port; `None` for none."""
    found = _HOST.fullmatch(value)
    return found[1].lower() if found else None


def _check_headers(headers: Headers) -> None:
    """Refuse headers that came at once, so that the connection did not count them."""
    if len(headers.raw) > MOST_HEADERS or sum(len(name) + len(value) for name, value in headers.raw) > MOST_HEADER_BYTES:
        raise headers_too_large()


def _check_content_type(headers: Headers) -> None:
    """Refuse anything but JSON: a web page can post other types without being asked."""
    kind, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise ApiError(415, "Send JSON: 'Content-Type: application/json', in UTF-8.", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Send the body without Content-Encoding.", code="unsupported_media_type")


def _too_long(settings: ServerSettings) -> ApiError:
    return ApiError(
        413,
        f"The body is longer than {settings.most_body_bytes:,} bytes. Send less, or start the server with --max-body.",
        code="body_too_large",
    )


def _refused_key(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
