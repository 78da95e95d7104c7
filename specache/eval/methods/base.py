"""What the suite asks of a method: start from a prefilled prompt, then decode one token at a time.

A method is a small frozen dataclass: its fields are its settings, and `--methods` sets them by name. It holds no state: `start`
returns a `Session`, which holds that of one sequence. Prefill is exact for every method, so all of them share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from specache.eval.prefilled import Prefilled


@dataclass(frozen=True)
class SessionStats:
    """What a session held and did.

    Attributes:
        fast_ratio: bytes in fast memory that the method needs for the full-attention layers (copy, kept pairs, residual), over the
            bytes of the same layers' ordinary cache in a 16-bit dtype. Unquantised rows count 2 bytes an element in any dtype.
        hot_ratio: the same for recently fetched rows or blocks, if the method has such a store.
        hit_rate: rows needed that were already there, of all rows needed; `None` where nothing is fetched ahead.
        guess_rate: speculative tokens that came true; `None` where nothing is guessed.
    """

    fast_ratio: float
    hot_ratio: float = 0.0
    hit_rate: float | None = None
    guess_rate: float | None = None


class Session(Protocol):
    """One sequence being decoded by one method. `feed` is called with one token at a time, as in generation."""

    def feed(self, token: int) -> Tensor:
        """Take one more token -> float32 logits [V] of the token after it."""

    def stats(self) -> SessionStats:
        """What was held at most and what happened so far."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""


class Method(Protocol):
    """A way to keep the key-value cache while decoding."""

    name: ClassVar[str]  # in the registry and on the command line
    summary: ClassVar[str]  # one line for `specache eval list`
    needs_all_queries: ClassVar[bool]  # wants the queries of the whole prompt (see `Prefilled`)

    def settings(self) -> dict[str, Any]:
        """JSON-ready settings that tell this method from others of the same name."""

    def start(self, prompt: Prefilled) -> Session:
        """Begin decoding after the prompt. Called under `torch.no_grad()` with the model attached to specache.

        Raises:
            MethodUnavailableError: a library or a machine that the method needs is missing; the message says which.
        """
