"""The parts of the check, in order of worth, and how long each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from specache.errors import ConfigError

_HERE = "specache.bench.gpu_check"


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        function: `module:function`, called with a `checks.PartRun` in a process of its own.
        seconds: its share of the whole time. It may use what earlier parts left of theirs.
    """

    number: int
    name: str
    function: str
    seconds: float

    def load(self) -> Any:
        """Return its function."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(module), name)


BUILD = Part(1, "environment", f"{_HERE}.build_part:run", 240)  # beside the others; its checks are added to part 1
PARTS = (
    Part(1, "environment", f"{_HERE}.environment_part:run", 65),
    Part(2, "kernels", f"{_HERE}.kernels_part:run", 90),
    Part(3, "generate", f"{_HERE}.generate_part:run", 55),
    Part(4, "memory", f"{_HERE}.memory_part:run", 30),
    Part(5, "speed", f"{_HERE}.speed_part:run", 65),
    Part(6, "paper", f"{_HERE}.paper_part:run", 55),
)  # parts 1 to 4 in 240 seconds, all in 360


def chosen_parts(text: str | None, parts: Sequence[Part] = PARTS) -> list[Part]:
    """Return the parts that `--parts` names: `1-4`, `2,5`; `None` for all.

    Raises:
        ConfigError: it is no such list, or names a part that does not exist.
    """
    if text is None:
        return list(parts)
    wanted: set[int] = set()
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        if not (first.isdigit() and (last.isdigit() if dash else not last)):
            raise ConfigError(f"--parts takes numbers such as 1-4 or 2,5, got {text!r}.")
        wanted |= set(range(int(first), int(last or first) + 1))
    known = {part.number for part in parts}
    if not wanted or wanted - known:
        raise ConfigError(f"--parts takes numbers from {min(known)} to {max(known)}, got {text!r}.")
    return [part for part in parts if part.number in wanted]
