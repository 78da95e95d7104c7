"""The page in a real browser, beside a live server with a tiny model. Skipped without Chromium."""

from __future__ import annotations

import json
import re
import threading

import pytest

from specache import SpeCacheConfig
from specache.engine.prefix_store import PrefixStore
from specache.engine.service import EngineService
from specache.server.app import ServerApp
from specache.server.launch import Server, listen
from specache.server.settings import ServerSettings
from tests.server.browser import CHAT, NARROW, WIDE, answer_with, chromium, events, watching
from tests.server.live_server import live
from tests.server.tiny_server import SHORT, printable_model, served_model

KEY = "a" * 24
FETCHING = SpeCacheConfig(policy="speculative", slow_tier="ram", residual=64, top_k=32)  # so that rows are ready or not
DOCUMENT = "".join(f"Year {year} was {'wet' if year % 3 else 'dry'}. " for year in range(60))


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser):
    model = printable_model(8192)
    with live(model=model, config=FETCHING, service={"prefixes": PrefixStore(model, FETCHING, most_slow_bytes=10**9)}) as server:
        yield server


def test_a_document_is_uploaded_asked_about_and_its_numbers_move(browser, server):
    with watching(browser, server.address) as watched:
        page = watched.page
        watched.set_up(most=1200)
        watched.upload(DOCUMENT)
        page.get_by_text(f"{len(DOCUMENT):,} tokens").wait_for()  # a byte is a token here
        watched.send("Which years were dry?")
        page.locator(".text.live, .text .live").wait_for()
        seen = {watched.answer()}
        new = {watched.fact("New tokens")}
        while page.is_visible("#stop"):
            page.wait_for_timeout(150)
            seen.add(watched.answer())
            new.add(watched.fact("New tokens"))
        assert len(seen) > 2 and len(new) > 1, "the answer and its numbers grow"
        page.get_by_text("Finished, at its limit").wait_for()
        assert watched.fact("New tokens") == "1,200" and watched.fact("Stored before") == "0"
        assert int(watched.fact("Prompt").replace(",", "")) > len(DOCUMENT)
        assert re.fullmatch(r"[\d.]+%", watched.fact("Rows ready")) and re.fullmatch(r"[\d.]+ m?s", watched.fact("First token"))
        sizes = page.locator("#requests li").first.locator("b[data-bytes]").all_inner_texts()
        assert len(sizes) == 3 and all(re.fullmatch(r"[\d.]+ [kM]B", size) for size in sizes)
        assert "less" in page.inner_text("#lead-times") and "this conversation" in page.inner_text("#requests li")
        watched.set_up(most=20)
        watched.send("And which were wet?")
        page.locator("#requests li").nth(1).wait_for()
        watched.wait_for_end()
        page.locator(".foot").nth(1).get_by_text("of them stored").wait_for()
        stored = int(watched.fact("Stored before").split()[0].replace(",", ""))
        assert stored >= len(DOCUMENT) - 300, "the document is not read again"
        assert page.locator("#chart path.ordinary").count() == 1 and page.locator("#chart path.fast").count() == 1
        assert "an ordinary cache" in page.get_attribute("#chart", "aria-label")
        page.get_by_text("Numbers as a table").click()
        page.locator("#rows tr").nth(1).wait_for()


def test_everything_works_with_a_keyboard_alone(browser, server):
    with watching(browser, server.address) as watched:
        page, keyboard = watched.page, watched.page.keyboard
        page.wait_for_selector("#state[data-is=ok]")
        focused = "document.activeElement.id || document.activeElement.className"
        assert page.evaluate(focused) == "question"
        page.focus(".skip")
        order = []
        for _ in range(10):
            keyboard.press("Tab")
            order.append(page.evaluate(focused))
            visible = "getComputedStyle(document.activeElement).outlineStyle !== 'none' || document.activeElement.id === 'question'"
            assert page.evaluate(visible), order[-1]  # the question's frame shows the focus
        assert order == [
            *("new", "settings-button", "log", "choose-first", "question"),
            *("choose", "send", "rail", "span", "chart"),
        ]
        page.focus("#settings-button")
        keyboard.press("Enter")
        assert page.evaluate(focused) == "system"
        keyboard.type("Be brief.")
        for text in ("0", "4000"):
            keyboard.press("Tab")
            keyboard.press("Control+a")
            keyboard.type(text)
        keyboard.press("Enter")
        page.wait_for_selector("#settings", state="hidden")
        page.focus("#question")
        keyboard.type("Go")
        keyboard.press("Shift+Enter")
        keyboard.type("on")
        assert page.input_value("#question") == "Go\non"
        keyboard.press("Enter")
        page.wait_for_selector(".live")
        keyboard.press("Escape")
        watched.wait_for_end()
        page.locator("#requests li").first.get_by_text("Stopped").wait_for()
        assert page.evaluate(focused) == "question" and page.inner_text(".question").endswith("Go\non")
        page.locator("#chart path.ordinary").wait_for(state="attached")  # two samples or more
        page.focus("#chart")
        keyboard.press("ArrowLeft")
        assert page.inner_text("#moment").startswith("at ")
        for _ in range(10):  # to the newest sample, and others may have come meanwhile
            keyboard.press("ArrowRight")
        assert page.inner_text("#moment") == ""
        assert "End of the answer" in page.inner_text("#spoken") or "Stopped" in page.inner_text("#spoken")


def test_stop_ends_the_answer_and_the_conversation_goes_on(browser, server):
    with watching(browser, server.address) as watched:
        page = watched.page
        watched.set_up(most=5000)
        watched.send("Go on and on")
        page.wait_for_selector(".live")
        page.click("#stop")
        watched.wait_for_end()
        page.locator("#requests li").first.get_by_text("Stopped").wait_for()
        page.wait_for_function("document.getElementById('total-running').textContent === '0'")
        kept = watched.answer()
        watched.set_up(most=5)
        with page.expect_request(CHAT) as sent:
            watched.send("And now?")
        watched.wait_for_end()
        messages = json.loads(sent.value.post_data)["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"].startswith(kept[:20]) and len(watched.answer()) == 5
        page.click("#new")
        assert page.locator(".turn").count() == 0 and page.is_visible("#empty")


def test_a_wrong_key_is_asked_for_again_and_the_right_one_is_kept_in_the_tab_only(browser):
    with live(keys={"alice": KEY}) as server, watching(browser, server.address, expected=("401",)) as watched:
        page = watched.page
        page.wait_for_selector("#key[open]")
        page.keyboard.press("Escape")
        assert page.is_visible("#key"), "nothing works without a key"
        page.fill("#key-input", "b" * 24)
        page.keyboard.press("Enter")
        page.get_by_text("The server does not know this key.").wait_for()
        page.fill("#key-input", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#state[data-is=ok]")
        watched.set_up(most=5)
        watched.send("Hello")
        watched.wait_for_end()
        assert len(watched.answer()) == 5
        kept = page.evaluate("[Object.values({...sessionStorage}), Object.values({...localStorage}), document.cookie]")
        assert kept == [[KEY], [], ""] and not any(KEY in url for url in watched.asked)
        page.reload()
        page.wait_for_selector("#state[data-is=ok]")
        assert not page.is_visible("#key")
        page.click("#settings-button")
        page.click("#forget")
        page.wait_for_selector("#key[open]")
        assert page.evaluate("sessionStorage.length") == 0


def test_a_question_that_was_refused_for_its_key_is_asked_with_the_next(browser, server):
    with watching(browser, server.address, expected=("401",)) as watched:
        page = watched.page
        watched.set_up(most=5)
        refused = {"error": {"message": "no", "code": "invalid_api_key"}}
        page.route(CHAT, lambda route: route.fulfill(status=401, json=refused), times=1)
        watched.send("Hello")
        page.wait_for_selector("#key[open]")
        page.fill("#key-input", KEY)  # this server takes any
        page.keyboard.press("Enter")
        page.wait_for_selector(".foot:visible")  # there as soon as the answer has begun
        watched.wait_for_end()
        assert len(watched.answer()) == 5 and page.locator(".turn").count() == 1


FED = """
const real = window.fetch;
const fed = () => new ReadableStream({ start(it) { window.feed = (text) => it.enqueue(new TextEncoder().encode(text)); } });
window.fetch = async (path, options) => (String(path).includes("chat") ? new Response(fed()) : real(path, options));
"""  # answers to questions are what the test passes to `feed`


def test_how_far_a_long_prompt_is_read_is_shown(browser, server):
    with watching(browser, server.address) as watched:
        page = watched.page
        page.add_init_script(FED)
        page.reload()
        watched.send("Read this")
        page.wait_for_function("'feed' in window")
        page.evaluate("feed(': ping\\n\\n: reading the prompt: 2048 of 65536 tokens\\n\\n')")
        page.get_by_text("Reading the prompt: 2,048 of 65,536 tokens").wait_for()
        assert page.get_attribute("[role=progressbar]", "aria-valuenow") == "3"
        page.wait_for_timeout(1100)
        page.evaluate("feed(': reading the prompt: 32768 of 65536 tokens\\r\\n\\r\\n')")
        page.get_by_text("Reading the prompt: 32,768 of 65,536 tokens").wait_for()
        assert page.get_attribute("[role=progressbar]", "aria-valuenow") == "50"
        halves = events({"content": "Héllo"})
        page.evaluate("(parts) => parts.forEach(feed)", [halves[:30], halves[30:]])
        watched.wait_for_end()
        assert watched.answer() == "Héllo" and not page.is_visible(".step")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser, server, scheme):
    with watching(browser, server.address, color_scheme=scheme, reduced_motion="reduce") as watched:
        page, sizes = watched.page, (WIDE, NARROW, (320, 600))
        page.wait_for_selector("#state[data-is=ok]")
        for size in sizes:
            watched.resize(size)
            assert watched.is_as_wide_as_its_window() and page.is_visible("#empty")
        long_word = "x" * 300
        answer_with(watched, events({"content": f"{long_word}\n\n```\n{long_word}\n```\n\n`{long_word}`\n\n- {long_word}"}))
        watched.upload("text", f"{long_word}.txt")
        watched.send(long_word)
        watched.wait_for_end()
        for size in sizes:
            watched.resize(size)
            assert watched.is_as_wide_as_its_window()
            page.click("#settings-button")
            box = page.locator("#settings").bounding_box()
            assert watched.is_as_wide_as_its_window() and box["x"] >= 0 and box["x"] + box["width"] <= size[0]
            page.keyboard.press("Escape")
            if size != WIDE:
                assert not page.is_visible("#rail")
                page.click("#view-memory")
                assert page.is_visible("#rail") and not page.is_visible("#question")
            assert page.is_visible("#chart") and watched.is_as_wide_as_its_window()
            if size != WIDE:
                page.click("#view-chat")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(246, 247, 248)") == (scheme == "light")
        assert page.evaluate("document.getAnimations().length") == 0, "nothing moves for those who do not want it"


def test_it_works_behind_a_proxys_prefix(browser):
    with live(root_path="/llm") as server:
        for path, prefix in (("/llm", "/llm/"), ("/llm/", "/llm/"), ("/", "/")):
            with watching(browser, server.address, path=path) as watched:
                watched.page.wait_for_selector("#state[data-is=ok]")
                watched.set_up(most=5)
                watched.send("Hello")
                watched.page.wait_for_selector(".foot:visible")
                assert {url for url in watched.asked if "completions" in url} == {f"{server.address}{prefix}v1/chat/completions"}


def test_it_waits_while_the_model_is_loaded(browser):
    settings, loads = ServerSettings(port=0), threading.Event()
    listener = listen(settings)
    model = printable_model()

    def load():
        assert loads.wait(100)
        return served_model(model), EngineService(model, SHORT)

    server = Server(ServerApp(settings), load)
    thread = threading.Thread(target=server.run_until_signal, args=(listener,))
    thread.start()
    try:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with watching(browser, address, expected=("503",)) as watched:
            page = watched.page
            page.get_by_text("Loading the model").wait_for()
            watched.set_up(most=5)
            watched.upload("A text.")
            page.get_by_text("counting tokens").wait_for()
            watched.send("Hello")
            page.get_by_text("asked as soon as it is there").wait_for()
            loads.set()
            page.get_by_text("7 tokens").wait_for()
            page.wait_for_selector(".foot:visible")
            watched.wait_for_end()
            assert len(watched.answer()) == 5
            server.stop()
            thread.join(60)
            page.wait_for_selector("#state[data-is=bad]")
            watched.errors.clear()  # the browser says that nobody answers
    finally:
        loads.set()
        server.stop()
        thread.join(60)
        listener.close()
