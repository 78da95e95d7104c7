"""`specache doctor`: what is installed, what the machine has, and what to do about problems."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from specache.cli import options
from specache.cli.console import EXIT_ERROR, quiet_libraries, reports_errors
from specache.cli.diagnosis import Problem, diagnose, find_problems
from specache.cli.json_file import print_json
from specache.cli.stats_table import size

_TITLES = {
    "versions": "Versions",
    "cpu": "CPU",
    "memory": "Memory",
    "devices": "Devices",
    "kernels": "Kernels",
    "native_kernels": "C++ kernels",
    "product_kernels": "Matrix products by weights",
    "gpu_kernels": "GPU kernels",
    "cache": "Cache folder",
    "disk_tier": "Tier disk",
    "auto_tier": "Tier auto",
    "compiled": "Compiled steps",
    "demo_model": "Demo model",
    "server": "Server (specache serve)",
}


@reports_errors
def doctor(as_json: options.Json = False) -> None:
    """Show versions, hardware, active kernels and memory, and what to do about problems.

    Leaves with exit code 1 if something is wrong that stops specache from working.
    """
    quiet_libraries()
    facts = diagnose()
    problems = find_problems(facts)
    if as_json:
        print_json({**facts, "problems": [problem.to_dict() for problem in problems]})
    else:
        _show(facts, problems)
    if any(problem.fatal for problem in problems):
        raise typer.Exit(EXIT_ERROR)


def _show(facts: dict[str, Any], problems: list[Problem]) -> None:
    out = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for section, title in _TITLES.items():
        table.add_row(f"[bold]{title}[/bold]", "")
        for name, value in facts[section].items():
            table.add_row(f"  {_name(name)}", _text(name, value))
    out.print(table)
    out.print()
    if not problems:
        out.print("No problems found.", style="green")
    for problem in problems:
        out.print(problem.what, style="bold red" if problem.fatal else "yellow", markup=False)
        out.print(f"  {problem.advice}", markup=False)


def _name(name: str) -> str:
    for unit in ("_bytes", "_bytes_per_second", "_seconds"):
        name = name.removesuffix(unit)
    return name.replace("_", " ")


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if name.endswith("_bytes"):
        return size(value)
    if name.endswith("_bytes_per_second"):
        return f"{size(value)}/s"
    if name.endswith("_seconds"):
        return f"{value * 1e6:.0f} us"
    return str(value)
