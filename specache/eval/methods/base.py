"""The interface of a method: start from a prefilled prompt, then decode one token at a time.

A method is a small frozen dataclass. Its fields are its settings, which `--methods` sets by name.
It holds no state: `start` returns a `Session`, which holds the state of one sequence. Prefill is
exact for every method, so all of them share one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from specache.eval.prefilled import Prefilled


@dataclass(frozen=True)
class SessionStats:
    """Memory and hit rates of a session.

    Attributes:
        fast_ratio: bytes in fast memory that the method needs for the full-attention layers
            (low-bit copy, kept pairs, residual), over the bytes of the same layers' ordinary 16-bit
            cache. Unquantised rows count 2 bytes per element in any dtype.
        hot_ratio: the same for recently fetched rows or blocks, if the method has such a store.
        hit_rate: share of the needed rows that were already in fast memory, or `None` where nothing
            is fetched ahead.
        guess_rate: share of the draft tokens that were right, or `None` without draft tokens.
    """

    fast_ratio: float
    hot_ratio: float = 0.0
    hit_rate: float | None = None
    guess_rate: float | None = None


class Session(Protocol):
    """One sequence that one method decodes. `feed` takes one token at a time, as in generation."""

    def feed(self, token: int) -> Tensor:
        """Take one more token -> float32 logits [V] of the token after it."""

    def stats(self) -> SessionStats:
        """Return the most memory held, and the hit rates so far."""

    def close(self) -> None:
        """Free everything. It is safe to call this twice."""


@dataclass(frozen=True)
class Method(ABC):
    """A way to keep the key-value cache while decoding. Its fields are its settings."""

    name: ClassVar[str]  # in the catalogue and on the command line
    summary: ClassVar[str]  # one line for `specache eval list`
    needs_all_queries: ClassVar[bool]  # whether it needs the queries of the whole prompt (see `Prefilled`)

    def settings(self) -> dict[str, Any]:
        """Return the settings that tell this method from others of the same name, JSON-ready."""
        return asdict(self)

    def defaults(self) -> dict[str, Any]:
        """Return the settings that need not be named, JSON-ready: labels leave them out."""
        return type(self)().settings()

    @abstractmethod
    def start(self, prompt: Prefilled) -> Session:
        """Begin decoding after the prompt.

        Called under `torch.no_grad()`, with the model attached to specache.

        Raises:
            MethodUnavailableError: the method needs a library or a machine that is missing. The
                message says which.
        """
