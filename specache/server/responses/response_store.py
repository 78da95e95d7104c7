"""Stored responses: per key, in memory, within a limit of bytes and of age."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from specache.server.error_responses import ApiError

_OVERHEAD = 1024  # bytes of objects and entries per response, beside its text
_LONGEST_NAME = 80  # characters of an identifier that an error repeats


@dataclass(eq=False)
class StoredTurn:
    """One response and what it was asked: a turn of a conversation.

    Attributes:
        owner: the name of the key that it belongs to.
        response_id: its identifier.
        response: the response object, as JSON.
        input_items: the list of its own input items, as JSON, without those of earlier turns.
        parent: the turn that it goes on from.
    """

    owner: str
    response_id: str
    response: bytes = field(repr=False)
    input_items: bytes = field(repr=False)
    parent: StoredTurn | None = field(repr=False)
    stored_at: float = 0.0
    uses: int = 0  # by the store under its identifier, by turns that go on from it, by requests

    @property
    def size(self) -> int:
        """Return the bytes that it takes."""
        return len(self.response) + len(self.input_items) + _OVERHEAD

    def conversation(self) -> list[StoredTurn]:
        """Return all turns up to this one, the oldest first."""
        turns: list[StoredTurn] = []
        turn: StoredTurn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]


class ResponseStore:
    """Keeps responses for later requests of the same key. Every method may run in any thread.

    A turn refers to the one that it goes on from, so that a conversation is stored once however
    long it is. A deleted or expired turn can no longer be asked for, but its memory is free only
    with the last turn that goes on from it.

    Args:
        most_bytes: the limit for all keys. Beyond it, responses of the key that holds most go, the
            least recently used first.
        age_s: seconds after which a response is gone.
        clock: returns the time in seconds.
    """

    def __init__(self, most_bytes: int, age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes = most_bytes
        self._age_s = age_s
        self._clock = clock
        self._lock = threading.Lock()
        self._turns: OrderedDict[str, StoredTurn] = OrderedDict()  # the oldest first
        self._recent: dict[str, OrderedDict[str, StoredTurn]] = {}  # owner -> least recently used first
        self._bytes: dict[str, int] = {}  # owner -> memory of all its turns, also of those without an identifier

    def add(self, owner: str, response_id: str, response: bytes, input_items: bytes, parent: StoredTurn | None = None) -> bool:
        """Store a response. Return False if there is no room for it.

        Args:
            parent: the turn that it goes on from, which the caller holds.
        """
        turn = StoredTurn(owner, response_id, response, input_items, parent, self._clock(), uses=1)
        with self._lock:
            self._expire()
            if parent is not None and not parent.uses:  # the request has ended, and nobody reads its answer
                return False
            if not self._make_room(turn.size):
                return False
            if parent is not None:
                parent.uses += 1
            self._turns[response_id] = turn
            self._recent.setdefault(owner, OrderedDict())[response_id] = turn
            self._bytes[owner] = self._bytes.get(owner, 0) + turn.size
        return True

    def find(self, owner: str, response_id: str) -> StoredTurn:
        """Return a stored response.

        Raises:
            ApiError: 404, this key has none of that name, or no longer.
        """
        with self._lock:
            return self._find(owner, response_id)

    def hold(self, owner: str, response_id: str) -> StoredTurn:
        """Return a stored response and count its memory until `release`, even if it goes meanwhile.

        Raises:
            ApiError: as `find`.
        """
        with self._lock:
            turn = self._find(owner, response_id)
            turn.uses += 1
            return turn

    def release(self, turn: StoredTurn) -> None:
        """End what `hold` began."""
        with self._lock:
            self._drop(turn)

    def delete(self, owner: str, response_id: str) -> None:
        """Forget a response.

        Raises:
            ApiError: as `find`.
        """
        with self._lock:
            self._forget(self._find(owner, response_id))

    def expire(self) -> None:
        """Forget the responses that are too old."""
        with self._lock:
            self._expire()

    def numbers(self, owner: str) -> dict[str, int]:
        """Return how many responses a key has stored, and the bytes they take."""
        with self._lock:
            self._expire()
            return {"stored": len(self._recent.get(owner, ())), "bytes": self._bytes.get(owner, 0)}

    @property
    def used_bytes(self) -> int:
        """Return the memory of all keys' responses."""
        with self._lock:
            return sum(self._bytes.values())

    def _find(self, owner: str, response_id: str) -> StoredTurn:
        self._expire()
        mine = self._recent.get(owner, OrderedDict())
        if response_id not in mine:
            raise missing_response(response_id)
        mine.move_to_end(response_id)
        return mine[response_id]

    def _expire(self) -> None:
        oldest = self._clock() - self._age_s
        while self._turns and (turn := next(iter(self._turns.values()))).stored_at <= oldest:
            self._forget(turn)

    def _make_room(self, size: int) -> bool:
        """Forget responses until `size` bytes fit. Return False if they do not."""
        if size > self._most_bytes:
            return False
        while sum(self._bytes.values()) + size > self._most_bytes:
            owner = max(self._recent, key=self._bytes.__getitem__, default=None)
            if owner is None:  # requests that run hold the rest
                return False
            self._forget(next(iter(self._recent[owner].values())))
        return True

    def _forget(self, turn: StoredTurn) -> None:
        """Take a response's identifier out, and free its memory unless others need it."""
        del self._turns[turn.response_id]
        mine = self._recent[turn.owner]
        del mine[turn.response_id]
        if not mine:
            del self._recent[turn.owner]
        self._drop(turn)

    def _drop(self, turn: StoredTurn) -> None:
        for unused in self._unused(turn):
            left = self._bytes[unused.owner] - unused.size
            if left:
                self._bytes[unused.owner] = left
            else:
                del self._bytes[unused.owner]

    def _unused(self, turn: StoredTurn | None) -> Iterator[StoredTurn]:
        """End one use of a turn, and yield those that nobody uses now."""
        while turn is not None:
            turn.uses -= 1
            if turn.uses:
                return
            yield turn
            turn = turn.parent


def missing_response(response_id: str, param: str | None = None, code: str = "response_not_found") -> ApiError:
    """Return the error of a response that is not stored, for this key or at all."""
    name = "".join(character if character.isprintable() else "?" for character in response_id[:_LONGEST_NAME])
    return ApiError(
        404,
        f"The response {name!r} is not stored for this key. Responses are kept in memory up to the server's limits "
        "(--response-bytes, --response-age), and not with store: false. Send the whole conversation as input.",
        code=code,
        param=param,
    )
