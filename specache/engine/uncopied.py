"""What belongs to its process, with threads and requests of its own, and cannot be copied."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from specache.errors import UsageError


class Uncopied:
    """A base whose objects refuse `copy.copy`, `copy.deepcopy` and pickling.

    A copy would share queues and stored pairs with the original, and both would spoil them.
    """

    instead: ClassVar[str]  # what to do, a sentence

    def __copy__(self) -> NoReturn:
        self._refuse()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self._refuse()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        name = type(self).__name__
        raise UsageError(f"{name} can be neither copied nor pickled: its requests and memory belong to it alone. {self.instead}")
