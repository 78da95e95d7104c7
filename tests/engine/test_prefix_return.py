"""A long prompt comes back from the disk in pieces, and running answers go on between them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache.cache.sizes import page_layout, window_bytes
from specache.engine import prefix_reuse
from specache.engine.events import Event, NewToken
from specache.engine.prefix_store import PrefixStore
from specache.engine.service import EngineService
from specache.errors import SlowTierError
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import plan
from specache.sessions import prefix_reading
from specache.tiers.disk.disk_tier import DiskTier
from tests.engine.serving import Client, Gate, alone, ask, service_of, settings
from tests.engine.test_service_prefixes import asked_in_turn
from tests.sessions.sequences import gemma
from tests.tiny import llama, prompt

LONG = 400
ANSWER = 80  # tokens of the answer that runs: more than there are pieces
MODELS = {"dense": llama, "hybrid": gemma}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: Any) -> Any:
    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step reads one piece, of 64 rows of a layer."""
    monkeypatch.setattr(prefix_reuse, "SLICE_S", 0.0)
    monkeypatch.setattr(prefix_reading, "KEY_BLOCK", 64)


def opened(model: Any, root: Path, config: specache.SpeCacheConfig | None = None, **options: Any) -> EngineService:
    config = config or settings()
    return service_of(model, config, prefixes=PrefixStore(model, config, folder=root, **options))


@pytest.fixture
def root(model: Any, tmp_path: Path) -> Path:
    """A folder with two long prompts."""
    with opened(model, tmp_path / "prefixes") as service:
        asked_in_turn(service, model, [prompt(LONG, seed=seed) for seed in (1, 2)], max_new_tokens=2)
    return tmp_path / "prefixes"


def test_a_prompt_fits_as_planned_also_where_its_windows_have_no_room_beside_the_old_ones(model, root):
    """They are kept until the rest of a prompt is read. Without room it is read in full."""
    config = settings()
    dimensions = specache.SpeCache(model, config).resources.dimensions
    pages = sum(page_layout(config, layer.kv_heads, layer.head_dim).page_bytes for layer in dimensions.full_layers)
    windows = window_bytes(dimensions)
    ids = torch.cat([prompt(LONG, seed=1)[:, : LONG - 90], prompt(90, seed=5)], dim=1)
    needed = plan(dimensions, config.resolved("cpu"), [PlannedSequence(LONG, 7)]).fast + pages
    cached = []
    for limit in (needed, needed + windows):
        with opened(model, root, settings(fast_memory=limit)) as service:
            client = ask(service, model, ids, job={"cacheable": False})
            client.end()
            assert service.status().fast_peak_bytes <= limit
        assert client.tokens() == alone(model, ids)[0]
        cached.append(client.cached)
    assert cached[1] > 64 and (cached[0] == 0) == (windows > 0)


class Reads:
    """The pieces that are read, and what happens at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None, happens: Any = None) -> None:
        self.count = 0
        real = DiskTier.read

        def read(tier: DiskTier, *args: Any) -> Any:
            self.count += 1
            if self.count == at:
                happens()
            return real(tier, *args)

        monkeypatch.setattr(DiskTier, "read", read)


def running(service: EngineService, model: Any) -> tuple[Client, list[Client], Gate]:
    """An answer that runs, and the request whose prompt comes back beside it.

    It is asked for when the gate is open.
    """
    asked: list[Client] = []
    gate = Gate()

    def when(client: Client, event: Event) -> None:
        if isinstance(event, NewToken) and len(client.tokens()) == 3:
            gate(client, event)
            asked.append(ask(service, model, prompt(LONG, seed=1)))

    return ask(service, model, prompt(20), when=when, max_new_tokens=ANSWER), asked, gate


def both_end(model: Any, stream: Client, asked: list[Client]) -> Client:
    stream.end()
    (client,) = asked
    client.end()
    assert client.tokens() == alone(model, prompt(LONG, seed=1))[0]
    assert stream.tokens() == alone(model, prompt(20), max_new_tokens=ANSWER)[0]
    return client


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_an_answer_gets_a_token_between_any_two_pieces(model, root, tmp_path, monkeypatch, tier):
    config = settings(slow_tier="ram") if tier == "ram" else settings(slow_tier="disk", slow_dir=str(tmp_path))
    seen: list[int] = []
    with opened(model, root, config) as service:
        stream, asked, gate = running(service, model)
        real = DiskTier.read

        def read(disk: DiskTier, *args: Any) -> Any:
            if disk.folder.parent == root:
                seen.append(len(stream.tokens()))
            return real(disk, *args)

        monkeypatch.setattr(DiskTier, "read", read)
        gate.open()
        client = both_end(model, stream, asked)
        assert service.status().prefixes.counters.brought_back == 1
    assert client.cached >= LONG - 256
    pieces = seen[-(len(seen) * 2 // 3) :]  # the first cut the last block of every layer
    assert len(pieces) >= 6 and len(set(pieces)) == len(pieces)


def test_a_request_whose_prompt_is_coming_back_can_be_aborted(model, root, monkeypatch):
    with opened(model, root) as service:
        stream, asked, gate = running(service, model)
        reads = Reads(monkeypatch, 7, lambda: asked[0].ticket.abort())
        gate.open()
        stream.end()
        assert asked[0].end().reasons == ("aborted",) and not asked[0].tokens()
        assert reads.count < 20
        again = ask(service, model, prompt(LONG, seed=1))
        again.end()
        assert again.cached >= LONG - 256  # it is still there
        service._prefixes.make_room(1 << 40, 1 << 40)
        assert service.status().fast_bytes == service.status().slow_bytes == 0
    assert again.tokens() == alone(model, prompt(LONG, seed=1))[0]


def test_a_service_that_ends_while_a_prompt_comes_back_leaves_nothing(model, root, monkeypatch):
    with opened(model, root) as service:
        _, asked, gate = running(service, model)
        Reads(monkeypatch, 7, lambda: service.close())
        gate.open()
        while not asked or not asked[0].ticket.wait(0.01):
            pass
    assert asked[0].end().reasons == ("aborted",)
    assert service.status().fast_bytes == service.status().slow_bytes == 0


def test_damage_that_is_found_in_the_middle_costs_the_prompt_a_reading(model, root, monkeypatch):
    def fails() -> None:
        raise SlowTierError("a checksum differs")

    with opened(model, root) as service, pytest.warns(RuntimeWarning, match="read again"):
        stream, asked, gate = running(service, model)
        Reads(monkeypatch, 9, fails)
        gate.open()
        client = both_end(model, stream, asked)
        assert client.cached == 0
    assert service.status().prefixes.counters.written == 1  # anew, in its place


def test_what_is_removed_from_the_disk_while_it_comes_back_is_no_damage(model, root, monkeypatch):
    with opened(model, root) as service, warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = service._prefixes._disk._folder
        stream, asked, gate = running(service, model)
        Reads(monkeypatch, 9, lambda: [folder.remove(saved) for saved in list(folder.saved)])
        gate.open()
        client = both_end(model, stream, asked)
        assert client.cached == 0 or client.cached >= LONG - 256
        assert not service.status().prefixes.ignored


def test_a_prompt_that_comes_back_is_not_the_one_that_makes_room_on_the_disk(model, root, monkeypatch):
    with opened(model, root) as service:
        folder = service._prefixes._disk._folder
        folder.most_bytes = folder.nbytes
        stream, asked, gate = running(service, model)
        Reads(monkeypatch, 9, lambda: folder.make_room(1))
        gate.open()
        assert both_end(model, stream, asked).cached >= LONG - 256
        assert folder.removals == 1


@pytest.mark.parametrize("beside", [False, True])
def test_the_bytes_of_a_prompt_that_comes_back_are_reserved_before(model, root, beside):
    """It fits beside the answer that runs, or waits; the budgets hold."""
    base = specache.SpeCache(model, settings())
    dimensions, config = base.resources.dimensions, base.config
    planned = [PlannedSequence(LONG, 8), *([PlannedSequence(20, ANSWER)] if beside else [])]
    pages = sum(page_layout(config, layer.kv_heads, layer.head_dim).page_bytes for layer in dimensions.full_layers)
    fast = plan(dimensions, config, planned).fast + len(planned) * pages
    rows = sum(-(-one.total // 256) + 1 for one in planned) * 256 * dimensions.stored_row_bytes
    with opened(model, root, settings(fast_memory=fast), most_slow_bytes=rows) as service:
        stream, asked, gate = running(service, model)
        gate.open()
        stream.end()
        assert both_end(model, stream, asked).cached >= LONG - 256
        status = service.status()
    assert status.failed == 0
    assert status.fast_peak_bytes <= fast and status.slow_peak_bytes <= rows
