"""`specache session`: look after the sessions that `--session` keeps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from specache.cli import options
from specache.cli.console import EXIT_ERROR, err, print_error, reports_errors, write
from specache.cli.json_file import print_json
from specache.cli.models import Device, Dtype
from specache.cli.stats_table import UNKNOWN, size
from specache.errors import ConfigError, SpeCacheError
from specache.linear.weight_format import WeightFormat

if TYPE_CHECKING:
    from specache.engine.repair import RepairReport

app = typer.Typer(
    help="List, show, fork, remove, export, import and repair sessions.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Argument(help="The session.", metavar="NAME", show_default=False)]
NewName = Annotated[str, typer.Argument(help="The new session.", metavar="NEW", show_default=False)]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--session-dir",
        help="The folder of sessions. Default: 'sessions' in the cache folder that 'specache doctor' shows.",
        metavar="DIR",
    ),
]


@app.command("list")
@reports_errors
def list_sessions(session_dir: Folder = None, as_json: options.Json = False) -> None:
    """List all sessions, by name."""
    from specache import sessions

    found = sessions.stored(session_dir)
    if as_json:
        print_json({"sessions": [summary.to_dict() for summary in found]})
        return
    if not found:
        err.print("There are no sessions.", style="dim")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title, justify in (("name", "left"), ("tokens", "right"), ("on disk", "right"), ("saved", "left"), ("model", "left")):
        table.add_column(title, justify=justify, header_style="dim")  # type: ignore[arg-type]
    for summary in found:
        if summary.problem is not None:
            table.add_row(summary.name, UNKNOWN, UNKNOWN, UNKNOWN, "damaged; see 'specache session show'")
        else:
            tokens = f"{summary.tokens:,}"
            table.add_row(summary.name, tokens, size(summary.bytes), _time(summary.saved), summary.model)
    Console(highlight=False, markup=False).print(table)


@app.command()
@reports_errors
def show(name: Name, session_dir: Folder = None, as_json: options.Json = False) -> None:
    """Show what a session holds, and the settings that it was made with."""
    from specache import sessions

    summary = sessions.show(name, session_dir)
    if as_json:
        print_json(summary.to_dict())
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    rows = {
        "name": summary.name,
        "folder": summary.folder,
        "model": f"{summary.model}, {summary.dtype}",
        "tokens": f"{summary.tokens:,}",
        "conversation": f"{summary.messages:,} messages" if summary.messages else UNKNOWN,
        "on disk": size(summary.bytes),
        "made": _time(summary.created),
        "saved": _time(summary.saved),
        "last answer": {"stop": "complete", "length": "cut at its length limit"}.get(summary.finish_reason or "", UNKNOWN),
        "compiled steps": UNKNOWN if summary.decode_steps is None else f"{summary.compiled_steps:,} of {summary.decode_steps:,}",
        **{key.replace("_", " "): str(value) for key, value in (summary.config or {}).items() if value is not None},
    }
    for title, value in rows.items():
        table.add_row(title, value)
    Console(highlight=False, markup=False).print(table)


@app.command()
@reports_errors
def fork(name: Name, new_name: NewName, session_dir: Folder = None) -> None:
    """Make a second session with the same content. They share files until they differ."""
    from specache import sessions

    sessions.fork(name, new_name, session_dir)


@app.command("rm")
@reports_errors
def remove(
    names: Annotated[list[str], typer.Argument(help="The sessions.", metavar="NAME", show_default=False)],
    session_dir: Folder = None,
) -> None:
    """Remove sessions. Their forks stay whole.

    One that cannot be removed is named, and the others are removed all the same.
    """
    from specache import sessions

    problems = []
    for name in dict.fromkeys(names):
        try:
            sessions.remove(name, session_dir)
        except SpeCacheError as error:
            problems.append(error)
    for problem in problems[:-1]:
        print_error(str(problem))
    if problems:
        raise problems[-1]


@app.command("export")
@reports_errors
def export_session(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The file to write; it must not be there yet.", metavar="FILE", show_default=False)],
    session_dir: Folder = None,
) -> None:
    """Write a session into one file."""
    from specache import sessions

    _refuse_stream(file)
    written = sessions.export_session(name, file, session_dir)
    err.print(f"{size(written)} in {file}", style="dim", markup=False)


def _refuse_stream(file: Path) -> None:
    if str(file) == "-":
        raise ConfigError("FILE must be a file, not '-': an export is checked as a whole. Name one.")


@app.command("import")
@reports_errors
def import_session(
    file: Annotated[Path, typer.Argument(help="A file that 'specache session export' wrote.", metavar="FILE", show_default=False)],
    name: NewName,
    session_dir: Folder = None,
) -> None:
    """Make a session from an exported file, after checking all of it."""
    from specache import sessions

    _refuse_stream(file)
    sessions.import_session(file, name, session_dir)


@app.command("repair")
@reports_errors
def repair_session(
    name: Name,
    model: options.OptionalModel = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say what is damaged, and change nothing. The exit code is 1 if something is.")
    ] = False,
    session_dir: Folder = None,
    dtype: options.DtypeOption = Dtype.AUTO,
    weights: options.WeightsOption = WeightFormat.AUTO,
    device: options.DeviceOption = Device.AUTO,
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Repair a damaged session: recompute what is damaged from its tokens, keep the rest.

    All files are checked first. A model is needed only if tokens must be read again.

    Damage that cannot be repaired is reported, and then nothing is changed.
    """
    from specache.engine import repair

    report = repair.check(name, folder=session_dir)
    if report.damages and not check:
        loaded = None
        if report.needs_model and model is not None:
            loading = options.LoadOptions(
                dtype=dtype, weights=weights, device=device, threads=threads, revision=revision, offline=offline
            )
            loaded = loading.load(model, "Loading the model")
        report = repair.repair(
            name,
            None if loaded is None else loaded.model,
            tokenizer=None if loaded is None else loaded.tokenizer,
            folder=session_dir,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _print_repair(report)
    if check and report.damages:
        raise typer.Exit(EXIT_ERROR)


def _print_repair(report: RepairReport) -> None:
    """Print what was damaged, and what was done."""
    for damage in report.damages:
        write(f"{damage.file}: {damage.problem}\n")
    if not report.damages:
        write(f"{report.name}: nothing is damaged; all {report.tokens:,} tokens are there.\n")
    elif report.mended:
        read = f"{report.tokens_read:,} of {report.tokens:,} tokens were" if report.tokens_read else "no token was"
        write(f"{report.name} is mended: {read} read again.\n")
    else:
        how = "with the model: -m MODEL" if report.needs_model else "without a model"
        write(f"'specache session repair {report.name}' can mend it, {how}.\n")


def _time(moment: float | None) -> str:
    return UNKNOWN if moment is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
