"""A fork may keep its 16-bit rows elsewhere: the same answers, from the rows that were stored."""

from __future__ import annotations

import pytest
import torch

import specache
from specache.errors import SlowTierError
from tests.tiny import llama, prompt

TIERS = ("ram-inplace", "ram", "disk")
GREEDY = {"max_new_tokens": 12, "do_sample": False}
SMALL = {"residual": 16, "group_size": 16, "top_k": 8}


@pytest.fixture(scope="module")
def model():
    return llama()


def place(tier, folder):
    return {"slow_tier": tier, **({"slow_dir": str(folder)} if tier == "disk" else {})}


def filled(model, tier, folder, **changes):
    cache = specache.SpeCache(model, specache.SpeCacheConfig(**SMALL, **place(tier, folder), **changes))
    specache.prefill(model, prompt(150), cache=cache)
    return cache


@pytest.mark.parametrize("before", TIERS)
@pytest.mark.parametrize("after", TIERS)
def test_a_fork_answers_the_same_wherever_its_rows_are(model, tmp_path, before, after):
    with filled(model, before, tmp_path / "before", policy="verified") as cache:
        with cache.fork(**place(after, tmp_path / "after"), policy="verified") as other:
            found = specache.generate(model, prompt(150), past_key_values=other, **GREEDY)
            assert other.config.slow_tier == after and other.stats()["slow_bytes"] > 0
        assert cache.config.slow_tier == before
        assert torch.equal(found, specache.generate(model, prompt(150), past_key_values=cache, **GREEDY))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_open_policy_is_chosen_anew_for_the_tier(model, tmp_path):
    with filled(model, "ram", tmp_path) as cache:
        assert cache.config.policy == "on-demand"
        with cache.fork(slow_tier="ram-inplace") as in_place, in_place.fork(slow_tier=f"disk:{tmp_path}") as on_disk:
            assert in_place.config.policy == "on-demand" and on_disk.config.policy == "verified"
            assert on_disk.config.slow_dir == str(tmp_path) and in_place.config.slow_dir is None
        with cache.fork(slow_tier="ram-inplace", policy="previous") as given:
            assert given.config.policy == "previous"


def test_a_session_is_forked_into_memory_and_goes_on_on_its_disk(model, tmp_path):
    with specache.Session("book", model, specache.SpeCacheConfig(**SMALL), folder=tmp_path) as session:
        specache.prefill(model, prompt(150), cache=session.cache)
        session.save()
        files = sorted(path.name for path in session.folder.iterdir())
        for changes in ({"slow_tier": "ram-inplace"}, {"slow_tier": "ram-inplace", "policy": "full"}, {"policy": "none"}):
            with session.cache.fork(**changes) as fork:
                specache.generate(model, prompt(150), past_key_values=fork, **GREEDY)
        assert sorted(path.name for path in session.folder.iterdir()) == files
        session.save()
    with specache.Session("book", model, folder=tmp_path) as session:
        assert len(session.token_ids) == 150


def test_a_fork_that_finds_no_room_leaves_nothing(model, tmp_path):
    with filled(model, "ram-inplace", tmp_path) as cache:
        (tmp_path / "file").write_text("")
        with pytest.raises(SlowTierError):
            cache.fork(slow_tier="disk", slow_dir=str(tmp_path / "file"))
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "file"]
        assert specache.generate(model, prompt(150), past_key_values=cache, **GREEDY).shape[1] == 162
