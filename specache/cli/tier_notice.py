"""Describe the choice of `--slow-tier auto`: as a note, in `doctor` and in `plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specache.cli.console import print_note
from specache.cli.stats_table import size
from specache.errors import SlowTierError
from specache.platform import heap, machine

if TYPE_CHECKING:
    from specache.tiers.tier_choice import TierChoice


def print_disk_choice(choice: TierChoice) -> None:
    """Print that the 16-bit pairs go to disk, and why. Keep the heap small from then on."""
    heap.keep_small()
    print_note(f"slow tier auto: {choice_text(choice.to_dict())}")


def choice_text(choice: dict[str, Any], including: str = "beside the model") -> str:
    """Return which tier was chosen, and why (`TierChoice.to_dict`).

    `including` says whether the need counts the weights.
    """
    needed, free = f"{size(choice['needed_bytes'])} {including}", size(choice["free_bytes"])
    if choice["slow_dir"] is None:
        return f"16-bit pairs in memory ({choice['slow_tier']}): this needs {needed}, and {free} are free."
    return (
        f"16-bit pairs on disk, in {choice['slow_dir']} ({size(choice['disk_bytes'])} of {size(choice['disk_free_bytes'])} free): "
        f"with them in memory this needs {needed}, and {free} are free."
    )


def auto_facts() -> dict[str, Any]:
    """Return the facts that `auto` decides by now, for `doctor`."""
    from specache.engine.auto_tier import most_that_fits
    from specache.tiers.disk.rows_folder import choose_rows_folder

    free = machine.available_memory()
    facts: dict[str, Any] = {"in_memory_up_to_bytes": None if free is None else most_that_fits(free)}
    try:
        folder = choose_rows_folder(0, make=False)
    except SlowTierError as error:
        return {**facts, "else_on_disk_in": None, "file_system": None, "free_bytes": None, "missing": str(error)}
    return {
        **facts,
        "else_on_disk_in": str(folder.folder),
        "file_system": folder.file_system,
        "free_bytes": folder.free,
        "missing": None,
    }
