"""The store of responses: whose they are, and its limits of bytes and age."""

from __future__ import annotations

import random
import threading

import pytest

from specache.server.error_responses import ApiError
from specache.server.responses.response_store import ResponseStore

SIZE = 10_000  # bytes of a response here


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def store_of(turns: float = 10, age_s: float = 100.0, clock: Clock | None = None) -> ResponseStore:
    """A store with room for so many responses of `SIZE` bytes."""
    return ResponseStore(int(turns * (SIZE + 1024)), age_s, clock or Clock())


def add(store: ResponseStore, name: str, owner: str = "alice", parent=None, size: int = SIZE) -> bool:
    return store.add(owner, name, b"x" * (size - 10), b"y" * 10, parent)


def holds(store: ResponseStore, name: str, owner: str = "alice") -> bool:
    try:
        return store.find(owner, name).response_id == name
    except ApiError as error:
        assert error.status == 404 and name in error.message and error.code == "response_not_found"
        return False


def test_a_response_is_there_for_its_own_key_only():
    store = store_of()
    assert add(store, "one")
    assert holds(store, "one") and not holds(store, "one", "bob") and not holds(store, "two")
    with pytest.raises(ApiError):
        store.delete("bob", "one")
    assert store.numbers("alice") == {"stored": 1, "bytes": SIZE + 1024}
    assert store.numbers("bob") == {"stored": 0, "bytes": 0}


def test_a_response_is_gone_after_its_age_and_so_is_its_memory():
    clock = Clock()
    store = store_of(age_s=100, clock=clock)
    add(store, "old")
    clock.now = 60
    add(store, "new")
    clock.now = 99.9
    assert holds(store, "old")
    clock.now = 100
    assert not holds(store, "old") and holds(store, "new")
    clock.now = 160
    store.expire()
    assert store.used_bytes == 0


def test_beyond_the_bytes_the_least_recently_used_goes():
    store = store_of(3)
    for name in ("a", "b", "c"):
        add(store, name)
    assert holds(store, "a")  # which uses it
    add(store, "d")
    assert [holds(store, name) for name in "abcd"] == [True, False, True, True]
    assert store.used_bytes == 3 * (SIZE + 1024)


def test_the_key_that_holds_most_makes_room_for_others():
    store = store_of(4)
    add(store, "mine", "bob")
    for number in range(10):
        assert add(store, f"alice-{number}")
    assert holds(store, "mine", "bob")
    assert add(store, "mine too", "bob")
    assert holds(store, "mine", "bob") and store.numbers("alice")["stored"] == 2


def test_a_response_larger_than_the_limit_is_not_stored_and_displaces_nothing():
    store = store_of(3)
    add(store, "small")
    assert not add(store, "large", size=4 * SIZE)
    assert holds(store, "small") and not holds(store, "large")


def test_a_conversation_outlives_the_responses_it_began_with():
    clock = Clock()
    store = store_of(age_s=100, clock=clock)
    add(store, "first")
    first = store.find("alice", "first")
    clock.now = 50
    add(store, "second", parent=first)
    clock.now = 120
    assert not holds(store, "first") and holds(store, "second")
    assert [turn.response_id for turn in store.find("alice", "second").conversation()] == ["first", "second"]
    assert store.used_bytes == 2 * (SIZE + 1024)  # the text of both
    clock.now = 150
    store.expire()
    assert store.used_bytes == 0


def test_a_deleted_response_leaves_the_turns_behind_it_whole():
    store = store_of()
    add(store, "first")
    add(store, "second", parent=store.find("alice", "first"))
    store.delete("alice", "first")
    assert not holds(store, "first") and len(store.find("alice", "second").conversation()) == 2
    store.delete("alice", "second")
    assert store.used_bytes == 0


def test_what_a_running_request_holds_counts_until_it_ends():
    store = store_of(3)
    add(store, "first")
    held = store.hold("alice", "first")
    store.delete("alice", "first")
    assert store.used_bytes == SIZE + 1024 and not holds(store, "first")
    assert add(store, "second", parent=held)
    store.release(held)
    assert store.used_bytes == 2 * (SIZE + 1024)
    store.delete("alice", "second")
    assert store.used_bytes == 0


def test_where_running_requests_hold_everything_nothing_is_stored():
    store = store_of(2)
    add(store, "a")
    add(store, "b")
    held = [store.hold("alice", name) for name in "ab"]
    assert not add(store, "c") and store.used_bytes == 2 * (SIZE + 1024)
    for turn in held:
        store.release(turn)
    assert store.used_bytes == 0 and add(store, "c")


def test_a_very_long_conversation_is_freed_at_once():
    store = ResponseStore(2**40, 100)
    parent = None
    for number in range(20_000):
        store.add("alice", str(number), b"", b"", parent)
        parent = store.find("alice", str(number))
        if number:
            store.delete("alice", str(number - 1))
    assert len(parent.conversation()) == 20_000
    store.delete("alice", "19999")
    assert store.used_bytes == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_bytes_are_those_of_what_can_be_reached(seed):
    """A thousand random acts of three keys, by the clock too."""
    generator, clock = random.Random(seed), Clock()
    store = store_of(12, age_s=300, clock=clock)
    known: list[tuple[str, str]] = []
    gone: list[tuple[str, str]] = []
    held = []
    for number in range(1000):
        clock.now += generator.random() * 10
        owner = generator.choice(["alice", "bob", "carol"])
        kept = [(who, name) for who, name in known if who != owner or holds(store, name, owner)]
        mine = [name for who, name in kept if who == owner]
        act = generator.random()
        if act < 0.5:
            parent = store.hold(owner, generator.choice(mine)) if mine and generator.random() < 0.6 else None
            if add(store, f"r{number}", owner, parent, generator.randrange(20, 3 * SIZE)):
                kept.append((owner, f"r{number}"))
            if parent is not None:
                held.append(parent)
        elif act < 0.7 and mine:
            store.delete(owner, generator.choice(mine))
        elif held:
            store.release(held.pop(generator.randrange(len(held))))
        kept = [(who, name) for who, name in kept if holds(store, name, who)]
        gone += [one for one in known if one not in kept]
        known = kept
        assert not gone or not holds(store, *reversed(generator.choice(gone)))
        roots = [store.find(who, name) for who, name in known] + held
        reached = {id(turn): turn for root in roots for turn in root.conversation()}
        assert store.used_bytes == sum(turn.size for turn in reached.values()) <= 12 * (SIZE + 1024)
    assert len(gone) > 300 and not any(holds(store, name, who) for who, name in gone)
    for turn in held:
        store.release(turn)
    clock.now += 1000
    store.expire()
    assert store.used_bytes == 0 and store.numbers("bob") == {"stored": 0, "bytes": 0}


def test_many_threads_leave_the_account_right():
    store = ResponseStore(40 * (SIZE + 1024), 1000)
    failed: list[BaseException] = []

    def work(owner: str) -> None:
        generator, last = random.Random(owner), None
        try:
            for number in range(400):
                name = f"{owner}-{number}"
                parent = None
                if last is not None and generator.random() < 0.7:
                    try:
                        parent = store.hold(owner, last)
                    except ApiError:
                        parent = None
                if add(store, name, owner, parent):
                    last = name
                if parent is not None:
                    store.release(parent)
                if generator.random() < 0.2 and last is not None and holds(store, last, owner):
                    store.delete(owner, last)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(f"owner{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and store.used_bytes <= 40 * (SIZE + 1024)
    for owner in range(6):
        for number in range(400):
            if holds(store, f"owner{owner}-{number}", f"owner{owner}"):
                store.delete(f"owner{owner}", f"owner{owner}-{number}")
    assert store.used_bytes == 0


def test_a_request_that_has_ended_stores_nothing_behind_what_it_went_on_from():
    """Its client left while the answer was stored; the turn before may have gone meanwhile."""
    store = store_of()
    assert add(store, "first")
    parent = store.hold("alice", "first")
    store.delete("alice", "first")
    store.release(parent)
    assert not add(store, "second", parent=parent)
    assert store.used_bytes == 0 and not holds(store, "second")
    assert add(store, "third") and store.used_bytes == SIZE + 1024
