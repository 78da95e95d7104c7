"""What the page refuses and what it does not believe: answers, errors, files. In a real browser."""

from __future__ import annotations

import json

import pytest

from tests.server.browser import CHAT, answer_with, chromium, events, watching
from tests.server.live_server import live

HOSTILE = '<script>document.title="owned"</script> <img src=x onerror="document.title=\'owned\'"> [a](javascript:alert(1))'
MARKDOWN = "# Title\n\nSome **bold**, *slanted* and `code`.\n\n- one\n- two\n\n3. three\n\n> said\n\n```\n<b>kept</b>\n```\n"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser):
    with live() as server:
        yield server


def test_text_of_a_model_stays_text(browser, server):
    with watching(browser, server.address) as watched:
        deltas = ({"role": "assistant"}, {"reasoning_content": HOSTILE}, {"content": HOSTILE}, {"content": f"\n\n{MARKDOWN}"})
        answer_with(watched, events(*deltas))
        watched.send(HOSTILE)
        watched.wait_for_end()
        page = watched.page
        text = page.locator(".turn .text")
        assert HOSTILE in text.inner_text() and page.locator(".question").inner_text().endswith(HOSTILE)
        assert page.locator(".turn script, .turn img, .turn a").count() == 0 and page.title() != "owned"
        assert text.locator("h3").inner_text() == "Title" and text.locator("strong").inner_text() == "bold"
        assert text.locator("em").inner_text() == "slanted" and text.locator("p code").inner_text() == "code"
        assert text.locator("ul li").all_inner_texts() == ["one", "two"] and text.locator("ol").get_attribute("start") == "3"
        assert text.locator("pre").inner_text() == "<b>kept</b>" and text.locator("blockquote").inner_text() == "said"
        reasoning = page.locator(".reasoning")
        assert not reasoning.locator("div").is_visible(), "it is folded"
        reasoning.locator("summary").click()
        assert reasoning.locator("div").inner_text() == HOSTILE


def test_the_policy_stops_a_script_that_got_in_all_the_same(browser, server):
    with watching(browser, server.address, expected=("Content Security Policy", "TrustedHTML", "Trusted")) as watched:
        page = watched.page
        for attempt in (
            "document.body.innerHTML = '<b>x</b>'",
            "document.body.setAttribute('onclick', 'document.title = 1')",
            "document.createElement('script').text = 'document.title = 1'",
        ):
            tried = page.evaluate(f"() => {{ try {{ {attempt}; return 'done'; }} catch (error) {{ return error.name; }} }}")
            assert tried == "TypeError", attempt
        outside = "fetch('http://127.0.0.1:9/').then(() => 'done', (error) => error.name)"
        assert page.evaluate(outside) == "TypeError"
        assert any("connect-src" in error for error in watched.errors), watched.errors
        watched.asked[:] = [url for url in watched.asked if ":9/" not in url]  # it was not sent


REFUSALS = (
    (429, {"code": "busy", "message": "64 requests wait"}, "The server is busy. Try again in 7 s."),
    (400, {"code": "context_length_exceeded", "message": "The prompt has 9 tokens."}, "does not fit into what the model can read"),
    (400, {"code": "exceeds_fast_memory", "message": "It needs 9 bytes."}, "needs more fast memory"),
    (413, {"code": "body_too_large", "message": "Longer than 9 bytes."}, "too long to send"),
    (503, {"code": "shutting_down", "message": "x"}, "The server is shutting down"),
    (502, None, "The server answered with status 502"),
)


def test_errors_are_said_in_plain_words_and_can_be_tried_again(browser, server):
    with watching(browser, server.address, expected=("Failed to load resource",)) as watched:
        page = watched.page
        watched.set_up(most=5)
        for status, error, words in REFUSALS:
            body = "<html>" if error is None else json.dumps({"error": error})
            kind = "text/html" if error is None else "application/json"
            answer_with(watched, body, status, kind, **{"retry-after": "7"})
            watched.send("Hello")
            assert words in page.locator("[role=alert]:visible").inner_text()
            page.unroute(CHAT)
            page.get_by_role("button", name="Try again").click()
            page.wait_for_selector(".foot:visible")  # there as soon as the answer has begun
            watched.wait_for_end()
            assert page.locator(".turn").count() == 1 and len(watched.answer()) == 5
            page.click("#new")


def test_a_stream_that_ends_in_an_error_or_breaks_off_says_so_and_keeps_what_came(browser, server):
    with watching(browser, server.address) as watched:
        page = watched.page
        failed = {"error": {"message": "Memory ran out.", "code": "out_of_memory"}}
        broken = (events({"content": "Half"}, failed, done=False), "Memory ran out.")
        cut = (events({"content": "Half"}, done=False), "The answer is not complete.")
        for body, words in (broken, cut):
            answer_with(watched, body)
            watched.send("Hello")
            page.get_by_text(words).wait_for()
            assert watched.answer() == "Half"
            page.unroute(CHAT)
            page.click("#new")


NO_TEXTS = (
    ("picture.png", b"\x89PNG\r\n\x1a\n\xff", "is not a text in UTF-8"),
    ("zeros.txt", b"a\0b", "zeros.txt is not a text."),
    ("empty.txt", b" \n", "is empty"),
    ("long.txt", b"a" * 20_000, "The server takes 10.0 kB at most"),
)


def test_files_that_cannot_be_a_document_are_refused_with_the_reason(browser, small_server):
    with watching(browser, small_server.address) as watched:
        page = watched.page
        page.wait_for_selector("#state[data-is=ok]")
        for name, content, words in NO_TEXTS:
            page.set_input_files("#file", {"name": name, "mimeType": "text/plain", "buffer": content})
            page.get_by_text(words).wait_for()
            assert not page.is_visible("#chip") and not [url for url in watched.asked if "tokenize" in url]
        watched.upload("A text.")
        page.get_by_text("7 tokens").wait_for()
        assert not page.is_visible("#file-error")
        page.click("#remove")
        assert not page.is_visible("#chip")


@pytest.fixture(scope="module")
def small_server(browser):
    with live(most_body_bytes=10_000) as server:
        yield server


def test_a_document_that_the_model_cannot_read_is_said_before_a_question(browser, small_server):
    with watching(browser, small_server.address) as watched:
        page = watched.page
        page.wait_for_selector("#state[data-is=ok]")
        watched.upload("a" * 600)
        page.get_by_text("600 tokens, the model reads 512").wait_for()
        watched.upload('"' * 6000)  # as JSON twice as long
        page.get_by_text("6,000 tokens").or_(page.get_by_text("too long to send")).first.wait_for()
        watched.send("Hello")
        page.get_by_text("more than the 10.0 kB that the server takes").wait_for()
        watched.errors[:] = [error for error in watched.errors if "413" not in error]


def test_a_dropped_file_becomes_the_document(browser, server):
    with watching(browser, server.address) as watched:
        page = watched.page
        page.wait_for_selector("#state[data-is=ok]")
        transfer = page.evaluate_handle(
            "() => { const it = new DataTransfer(); it.items.add(new File(['dropped text'], 'dropped.md')); return it; }"
        )
        page.dispatch_event("#log", "dragenter", {"dataTransfer": transfer})
        assert page.is_visible("#drop")
        page.dispatch_event("#log", "drop", {"dataTransfer": transfer})
        assert not page.is_visible("#drop")
        page.get_by_text("12 tokens").wait_for()
        assert page.inner_text("#document-name") == "dropped.md"
