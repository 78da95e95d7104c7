"""The page at `/` without a browser: who gets it, what it may do, and that it is one file."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys

import pytest
from starlette.testclient import TestClient

import specache
from specache.cli.serve_options import ServerOptions
from specache.server.app import ServerApp
from specache.server.settings import ServerSettings
from specache.server.web_page import PAGE
from tests.server.tiny_server import ADDRESS, error_of, running

TEXT = PAGE.read_text()
KEYS = {"alice": "a" * 24}
SVG = "http://www.w3.org/2000/svg"
ROOTS = re.findall(r":root \{(.*?)\n *\}", TEXT, re.DOTALL)  # light, and what is different in dark
LIGHT, DARK = (dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", root)) for root in ROOTS)
SINKS = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "Function(", "srcdoc")


def policy_of(response) -> dict[str, list[str]]:
    """The directives of the Content-Security-Policy, by name."""
    parts = [part.split() for part in response.headers["content-security-policy"].split(";")]
    return {name: values for name, *values in parts}


def test_the_page_needs_no_key_and_its_data_does():
    with running(keys=KEYS) as client:
        for method in ("GET", "HEAD"):
            response = client.request(method, "/")
            assert response.status_code == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
        assert client.get("/").text == TEXT
        for path in ("/v1/status", "/v1/status?since=0", "/v1/models"):
            assert client.get(path).status_code == 401


def test_the_page_is_there_while_the_model_is_loaded():
    with TestClient(ServerApp(ServerSettings(root_path="/llm")), base_url=ADDRESS) as client:
        assert client.get("/").text == client.get("/llm/").text == client.get("/llm").text == TEXT
        assert client.get("/index.html").status_code == 503


def test_the_page_is_behind_a_proxys_prefix_too_without_a_key():
    with running(settings=ServerSettings(root_path="/llm"), keys=KEYS) as client:
        assert client.get("/").text == client.get("/llm/").text == client.get("/llm").text == TEXT
        assert client.get("/llm/llm/").status_code == client.get("/llmx").status_code == 401


def test_no_page_turns_it_off():
    assert ServerOptions().settings().page and not ServerOptions(page=False).settings().page
    app = ServerApp(ServerSettings(page=False))
    with running(settings=ServerSettings(page=False)) as client, TestClient(app, base_url=ADDRESS) as loading:
        assert error_of(client.get("/"))["code"] == error_of(loading.get("/"))["code"] == "not_found"
        assert client.get("/v1/status").status_code == 200


def test_the_page_is_for_this_servers_names_and_own_pages_only(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/", headers={"origin": "http://evil.example"}).status_code == 403
    framed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/", headers=framed).status_code == 403
    assert client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200


def test_a_browser_runs_the_files_own_script_and_style_and_nothing_else(client):
    response = client.get("/")
    policy = policy_of(response)
    for directive, element in (("script-src", "script"), ("style-src", "style")):
        contents = re.findall(rf"<{element}\b[^>]*>(.*?)</{element}>", TEXT, re.DOTALL)
        assert len(contents) == 1
        digest = base64.b64encode(hashlib.sha256(contents[0].encode()).digest()).decode()
        assert policy.pop(directive) == [f"'sha256-{digest}'"]
    nothing = {name for name, values in policy.items() if values == ["'none'"]}
    assert nothing == {"default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"}
    assert policy["connect-src"] == ["'self'"] and policy["img-src"] == ["data:"]
    assert policy["require-trusted-types-for"] == ["'script'"]
    headers = response.headers
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY" and headers["cross-origin-opener-policy"] == "same-origin"


def test_the_file_refers_to_nothing_outside():
    addresses = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s\"'()]*", TEXT))
    assert addresses <= {SVG}
    assert re.findall(r"(?:src|href)=\"?([^\"\s>]+)", TEXT.replace("data:image/svg+xml", "data:")) == ["data:,%3Csvg", "#question"]
    assert not re.search(r"@import|@font-face|url\(", TEXT)


def test_no_text_can_become_markup_or_code():
    for sink in SINKS:
        assert sink not in TEXT
    markup = TEXT.split("<script>")[0]
    assert not re.search(r"\son[a-z]+=|\sstyle=", markup), "the policy forbids attributes with code or style"
    assert "localStorage" not in TEXT and "document.cookie" not in TEXT


@pytest.mark.parametrize("colours", [LIGHT, {**LIGHT, **DARK}], ids=["light", "dark"])
def test_texts_stand_out_from_what_they_stand_on(colours):
    """WCAG AA: 4.5 for text, 3 for borders of fields and for drawings."""
    for ground in ("page", "panel", "sunken"):
        for text in ("text", "muted", "bad"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    pairs = [("accent-text", "accent"), ("accent", "panel"), ("accent", "accent-soft"), ("text", "bad-soft")]
    for text, ground in pairs:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    pairs = [("line-strong", "panel"), ("fast", "panel"), ("slow", "panel"), ("ordinary", "slow"), ("ordinary", "panel")]
    for drawn, ground in pairs:
        assert contrast(colours[drawn], colours[ground]) >= 3, (drawn, ground)


def contrast(one: str, other: str) -> float:
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    values = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_file_lies_in_the_package():
    """scikit-build-core puts everything in `specache/` into the wheel that git does not ignore."""
    assert any(PAGE.is_relative_to(folder) for folder in specache.__path__)
    ignored = subprocess.run(["git", "check-ignore", str(PAGE)], cwd=PAGE.parent, capture_output=True, text=True)
    assert not ignored.stdout


def test_serving_the_page_does_not_import_pytorch():
    code = "import sys, specache.server.app; assert 'specache.server.web_page' in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
