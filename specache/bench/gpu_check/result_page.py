"""The results on disk: one JSON object and one page of text, replaced after every part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from specache.bench.gpu_check.device_text import device_text
from specache.bench.gpu_check.states import FAILED, PASSED, RUNNING, SKIPPED

JSON_NAME, TEXT_NAME, LOG_NAME, DEVICE_NAME = "gpu-check.json", "gpu-check.txt", "gpu-check.log", "device.toml"
WIDTH = 150


class Results:
    """What is known of every part, in a folder.

    Args:
        identity: what results depend on (tree, device, versions). Parts of another identity are
            not taken over.

    Attributes:
        parts: number -> record, JSON-ready.
        dropped: whether the folder held results of something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.parts: dict[int, dict[str, Any]] = {}
        self.dropped = False
        document = _read(folder / JSON_NAME)
        if document is None:
            return
        if document.get("identity") != identity:
            self.dropped = True
            return
        self.parts = {int(number): record for number, record in document["parts"].items()}

    def passed(self, number: int) -> bool:
        """Return whether a part has passed."""
        return self.parts.get(number, {}).get("status") == PASSED

    def set(self, number: int, record: dict[str, Any]) -> None:
        """Replace a part's record, and write both files."""
        if self.parts.get(number) != record:
            self.parts[number] = record
            self.write()

    def write(self) -> None:
        """Write both files, each as a whole."""
        document = {"identity": self.identity, "status": self.status, "parts": {str(n): self.parts[n] for n in sorted(self.parts)}}
        _replace(self.folder / JSON_NAME, json.dumps(document, indent=1) + "\n")
        _replace(self.folder / TEXT_NAME, page(document))
        if "rates" in self.facts:
            _replace(self.folder / DEVICE_NAME, device_text(self.facts))

    @property
    def facts(self) -> dict[str, Any]:
        """Return the facts of all parts."""
        return {name: value for record in self.parts.values() for name, value in record["facts"].items()}

    @property
    def status(self) -> str:
        """Return `failed` if any part has not passed, else `passed`."""
        return PASSED if self.parts and all(record["status"] == PASSED for record in self.parts.values()) else FAILED


def record_of(name: str, state: dict[str, Any] | None, ended: str | None, seconds: float, running: bool = False) -> dict[str, Any]:
    """Return a part's record.

    Args:
        state: the part's state file, or `None` if there is none.
        ended: why the process did not end as it should, or `None`.
        running: whether it still runs.
    """
    state = state or {"checks": [], "tables": {}, "notes": [], "facts": {}, "running": None, "complete": False}
    checks = [dict(check) for check in state["checks"]]
    if not running and not state["complete"] and ended is None:
        ended = "its process ended before the part was complete"
    if ended is not None:
        where = state["running"]
        for check in checks:
            if check["name"] == where:
                check["status"], check["message"] = FAILED, ended
        if where is None and not (state["complete"] and any(check["status"] == FAILED for check in checks)):
            checks.append(
                {"name": "the part's process", "status": FAILED, "message": ended, "seconds": 0.0, "details": {}, "warned": []}
            )
    failed = ended is not None or not checks or any(check["status"] == FAILED for check in checks)
    status = RUNNING if running else FAILED if failed else PASSED
    kept = {key: state[key] for key in ("tables", "notes", "facts")}
    return {"name": name, "status": status, "seconds": round(seconds, 1), "ended": ended, "checks": checks, **kept}


def page(document: dict[str, Any]) -> str:
    """Return the page: what failed first, then the parts, then the tables."""
    parts = document["parts"]
    lines = [f"specache GPU check: {document['status'].upper()}", _identity(document["identity"]), ""]
    failed = [(number, one) for number, record in parts.items() for one in record["checks"] if one["status"] == FAILED]
    if failed:
        lines.append(f"FAILED: {len(failed)} checks")
        for number, check in failed:
            first, *rest = (check["message"] or "no message").splitlines()
            lines.append(f"  {number} {check['name']}: {first}"[: 2 * WIDTH])
            lines += [f"      {line.strip()}"[:WIDTH] for line in rest[-4:]]
        lines.append("")
    lines.append("PARTS")
    for number, record in parts.items():
        counts = {status: sum(one["status"] == status for one in record["checks"]) for status in (PASSED, FAILED, SKIPPED)}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        lines.append(f"  {number} {record['name']:<12} {record['status']:<8} {record['seconds']:>6.1f} s  {said}")
        lines += [f"      {note}" for note in record["notes"]]
    skipped = [(number, one) for number, record in parts.items() for one in record["checks"] if one["status"] == SKIPPED]
    if skipped:
        lines += ["", "SKIPPED", *(f"  {number} {check['name']}: {check['message']}"[: 2 * WIDTH] for number, check in skipped)]
    for record in parts.values():
        for name, rows in record["tables"].items():
            lines += ["", name.upper(), *table_lines(rows)]
    lines += ["", "CHECKS"]
    for number, record in parts.items():
        for check in record["checks"]:
            lines.append(
                f"  {number} {check['status']:<8} {check['seconds']:>7.2f} s  {check['name']}  {_short(check['details'])}"[
                    : 2 * WIDTH
                ]
            )
            lines += [f"      warned: {text}"[: 2 * WIDTH] for text in check["warned"][:3]]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return rows of one or more kinds as aligned columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _identity(identity: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in identity.items() if value)


def _short(details: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_cell(value)}" for key, value in details.items() if not isinstance(value, list | dict))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or `None` if there is none that can be used."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return document if isinstance(document["parts"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
