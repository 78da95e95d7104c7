"""A headless Chromium that watches what a page does: errors, and what it asks for and where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHAT = "**/v1/chat/completions"
WIDE, NARROW = (1400, 900), (400, 850)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SLOW_MS = 30_000  # for what other processes on the same cores may hold up


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield a browser. Skip the test where there is none."""
    path = shutil.which("chromium", path="/usr/bin") or shutil.which("chromium")
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no Playwright: pip install playwright")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A page at a server's `/`, and what it did.

    Attributes:
        errors: what the console and uncaught exceptions said.
        asked: the address of every request.
    """

    page: Page
    address: str
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def send(self, question: str) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def upload(self, text: str, name: str = "notes.txt") -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": "text/plain", "buffer": text.encode()})

    def set_up(self, **settings: Any) -> None:
        """Fill in the settings' fields and save them."""
        self.page.click("#settings-button")
        for name, value in {"temperature": 0, **settings}.items():  # the tiny model's likeliest bytes are ASCII
            self.page.fill(f"#{name}", str(value))
        self.page.press("#most", "Enter")
        assert not self.page.is_visible("#settings")

    def answer(self, number: int = -1) -> str:
        return str(self.page.locator(".turn .text").nth(number).inner_text())

    def wait_for_end(self, timeout: float = SLOW_MS) -> None:
        """Wait until no answer is under way."""
        self.page.wait_for_selector("#send", state="visible", timeout=timeout)

    def fact(self, name: str, request: int = 0) -> str:
        """Return a fact of a request, the newest first, by its name in the list."""
        row = self.page.locator("#requests li").nth(request).locator(".facts > div", has_text=name)
        return str(row.locator("dd").inner_text())

    def resize(self, size: tuple[int, int]) -> None:
        self.page.set_viewport_size({"width": size[0], "height": size[1]})

    def is_as_wide_as_its_window(self) -> bool:
        """Return whether neither the page nor one of its two parts is to be scrolled sideways."""
        parts = "[document.documentElement, ...document.querySelectorAll('.log, .rail')]"
        return bool(self.page.evaluate(f"{parts}.every((part) => part.scrollWidth <= part.clientWidth)"))


@contextmanager
def watching(
    browser: Browser, address: str, *, size: tuple[int, int] = WIDE, expected: tuple[str, ...] = (), path: str = "/", **options: Any
) -> Iterator[Watched]:
    """Yield the page of a server, and check at the end that it made no error and asked nobody else.

    Args:
        expected: parts of errors that the test means.
    """
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    context.set_default_timeout(SLOW_MS)
    try:
        watched = Watched(context.new_page(), address)
        page = watched.page
        page.on("console", lambda message: watched.errors.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        page.on("request", lambda request: watched.asked.append(request.url))
        page.goto(address + path)
        yield watched
        assert [error for error in watched.errors if not any(part in error for part in expected)] == []
        assert {urlsplit(url).netloc for url in watched.asked if not url.startswith("data:")} == {urlsplit(address).netloc}
    finally:
        context.close()


def events(*chunks: dict | str, done: bool = True) -> str:
    """The body of a stream: comments are texts, data are deltas of the first choice."""
    lines = []
    for chunk in chunks:
        if isinstance(chunk, str):
            lines.append(f": {chunk}\n\n")
        else:
            body = chunk if "error" in chunk else {"choices": [{"index": 0, "delta": chunk, "finish_reason": None}]}
            lines.append(f"data: {json.dumps(body)}\n\n")
    return "".join(lines) + ("data: [DONE]\n\n" if done else "")


def answer_with(watched: Watched, body: str, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
    """Have the browser get this answer to a question, in place of the server's."""
    watched.page.route(CHAT, lambda route: route.fulfill(status=status, body=body, headers={"content-type": kind, **headers}))
