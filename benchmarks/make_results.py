"""Run the runs of `benchmarks/runs.toml` one after the other, then fill the results board.

    python -m benchmarks.make_results --out results [--only NAMES] [--model gemma=FILE.gguf]

`make results` calls it. Every run has a folder of its own in OUT. A finished run is not run again;
one that was stopped goes on where it was. After each run its summary is written to docs/results/,
and the tables of docs/results.md are filled. Runs whose model has no path are skipped; a run that
fails is named, and the next one starts. The exit code is 1 if one failed, 130 after Ctrl-C.

Times are stated as it goes: what has elapsed, and about how much is left, by the estimates of the
list, corrected by the runs that are finished.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import board
from benchmarks.run_list import FILE, ListedRun, RunListError, read_run_list
from specache.errors import SpeCacheError
from specache.eval.origin import checkout_commit
from specache.eval.results import write_file
from specache.eval.run_summary import FORMAT, summarise, summary_text

STATE_FILE = "state.json"
BENCH_FILE = "bench.json"
_INTERRUPTED = 130
_GRACE_SECONDS = 30  # for a child to end after Ctrl-C
_PROGRAM = "import sys; from specache.cli.main import app; sys.argv[0] = 'specache'; app()"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class State:
    """What is known of a run's folder.

    Attributes:
        seconds: that were spent in it, over all calls.
        finished: whether it is done.
        arguments: of the command that is done or was begun.
        commit: that it was last run at.
    """

    seconds: float = 0.0
    finished: bool = False
    arguments: tuple[str, ...] = ()
    commit: str | None = None

    @classmethod
    def read(cls, folder: Path) -> State:
        """Return a folder's state. A folder without one was not begun."""
        try:
            values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            return cls(values["seconds"], values["finished"], tuple(values["arguments"]), values["commit"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, folder: Path) -> None:
        """Replace the folder's state."""
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / STATE_FILE, json.dumps(self.__dict__) + "\n")


class Results:
    """The runs that were chosen, and their folders."""

    def __init__(self, runs: list[ListedRun], models: dict[str, str], out: Path) -> None:
        self.skipped = [run for run in runs if not set(run.needs) <= models.keys()]
        self.runs = [run for run in runs if run not in self.skipped]
        self._models = models
        self._out = out

    def folder(self, run: ListedRun) -> Path:
        """Return the run's folder."""
        return self._out / run.name

    def finished(self, run: ListedRun) -> bool:
        """Return whether the run is done with the command of the list."""
        state = State.read(self.folder(run))
        return state.finished and list(state.arguments) == run.arguments(self._models)

    def seconds_left(self) -> float:
        """Estimate the time of the runs that are not finished."""
        states = {run.name: State.read(self.folder(run)) for run in self.runs}
        done = [run for run in self.runs if self.finished(run)]
        estimated = sum(run.minutes for run in done) * 60
        factor = sum(states[run.name].seconds for run in done) / estimated if estimated else 1.0
        todo = [run for run in self.runs if run not in done]
        return sum(max(0.0, run.minutes * 60 * factor - states[run.name].seconds) for run in todo)

    def run(self, run: ListedRun) -> int:
        """Run or resume one run -> its exit code. 130: it was interrupted."""
        folder, arguments = self.folder(run), run.arguments(self._models)
        spent = State.read(folder).seconds
        folder.mkdir(parents=True, exist_ok=True)
        target = ["--out", str(folder)] if arguments[0] == "eval" else ["--json", str(folder / BENCH_FILE)]
        started = time.monotonic()
        code = 1
        try:
            code = _child([sys.executable, "-c", _PROGRAM, *arguments, *target])
        finally:
            seconds = spent + time.monotonic() - started
            State(round(seconds, 1), code == 0, tuple(arguments), checkout_commit()).write(folder)
        return code

    def summary(self, run: ListedRun) -> dict[str, Any]:
        """Return the summary of a finished run.

        Raises:
            EvaluationError: its folder does not hold what it should.
        """
        folder = self.folder(run)
        if run.arguments(self._models)[0] == "eval":
            return summarise(folder, commit=State.read(folder).commit)
        file = folder / BENCH_FILE
        date = datetime.fromtimestamp(file.stat().st_mtime, UTC).date().isoformat()
        return _bench_summary(run, json.loads(file.read_text(encoding="utf-8")), State.read(folder).commit, date)


@app.command()
def main(
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs' folders.")] = Path("results"),
    only: Annotated[str, typer.Option("--only", metavar="LIST", help="Names of runs. Default: all of the list.")] = "",
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME=PATH", help="Path of a model that commands call {NAME}.")
    ] = None,
    run_list: Annotated[Path, typer.Option("--list", help="The list of runs.")] = FILE,
    results: Annotated[Path, typer.Option("--results", help="Folder for the summaries.")] = board.RESULTS,
    page: Annotated[Path, typer.Option("--page", help="The page with the tables.")] = board.PAGE,
    show: Annotated[bool, typer.Option("--show", help="Run nothing: show the runs, what is finished, and the time.")] = False,
) -> None:
    """Run the evaluations behind docs/results.md that are not finished, and fill its tables."""
    try:
        chosen = Results(read_run_list(run_list).chosen(only), _models(model or []), out)
    except RunListError as error:
        _print(f"error: {error}")
        raise typer.Exit(2) from None
    for run in chosen.skipped:
        _print(f"skipped: {run.name} needs {' and '.join(f'--model {name}=PATH' for name in run.needs)} ({_variables(run)}).")
    done = [run for run in chosen.runs if chosen.finished(run)]
    _print(f"{len(chosen.runs)} runs, {len(done)} of them finished earlier; about {_duration(chosen.seconds_left())} to go.")
    if show:
        for run in chosen.runs:
            state = "finished" if run in done else f"about {_duration(run.minutes * 60)} by the list"
            _print(f"  {run.name} ({run.question}): {state}, {_duration(State.read(chosen.folder(run)).seconds)} spent")
        return
    commit = checkout_commit()
    if commit is None:
        _print("error: this is no checkout of git, so that rows could not name their commit. Clone the repository.")
        raise typer.Exit(2)
    if commit.endswith("+"):
        _print(f"warning: specache/ or csrc/ has changes that are not committed; rows will name the commit {commit}.")
    failed = _run_all(chosen, results, page, run_list)
    if failed:
        _print(f"error: failed: {', '.join(failed)}. The messages are above; the same command tries them again.")
        raise typer.Exit(1)


def _run_all(chosen: Results, results: Path, page: Path, run_list: Path) -> list[str]:
    """Run everything, and put what is finished on the board -> the names of runs that failed."""
    began = time.monotonic()
    failed: list[str] = []
    for place, run in enumerate(chosen.runs, 1):
        if chosen.finished(run):
            state = State.read(chosen.folder(run))
            _print(f"[{place} of {len(chosen.runs)}] {run.name}: finished at commit {state.commit} in {_duration(state.seconds)}")
        else:
            times = f"elapsed {_duration(time.monotonic() - began)}, about {_duration(chosen.seconds_left())} to go"
            _print(f"[{place} of {len(chosen.runs)}] {run.name}: specache {run.command} ({times})")
            code = chosen.run(run)
            if code == _INTERRUPTED:
                _print(
                    f"Interrupted in {run.name} after {_duration(time.monotonic() - began)}. The same command goes on from here."
                )
                raise typer.Exit(_INTERRUPTED)
            if code != 0:
                _print(f"error: {run.name} failed with exit code {code}.")
                failed.append(run.name)
                continue
        try:
            results.mkdir(parents=True, exist_ok=True)
            write_file(results / f"{run.name}.json", summary_text(chosen.summary(run)))
            board.fill(page, results, run_list)
        except (SpeCacheError, board.BoardError, OSError, ValueError, KeyError) as error:
            _print(f"error: {run.name} cannot be put on the board: {error}")
            failed.append(run.name)
    _print(f"{len(chosen.runs) - len(failed)} runs are on the board, after {_duration(time.monotonic() - began)}.")
    return failed


def _child(command: list[str]) -> int:
    """Run a command -> its exit code, 130 if this process was interrupted meanwhile."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    child = subprocess.Popen(command)
    try:
        return child.wait()
    except KeyboardInterrupt:
        try:
            child.wait(_GRACE_SECONDS)  # a terminal has sent it Ctrl-C as well
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        return _INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _bench_summary(run: ListedRun, document: dict[str, Any], commit: str | None, date: str) -> dict[str, Any]:
    """Return the summary of a benchmark's JSON document."""
    model = (document.get("model") or {}).get("name") or document["settings"].get("shape")
    machine, versions = document["machine"], document["versions"]
    origin = {
        "commit": commit,
        "date": date,
        "machine": machine["cpu"],
        "threads": machine["threads"],
        "kernels": next(iter(document["kernels"]["active"].values())),
        **{name: versions[name] for name in ("torch", "transformers", "python")},
    }
    left_out = ("phases", "breakdown", "spread")
    rows = [{key: value for key, value in row.items() if key not in left_out} for row in document["results"]]
    return {
        "format": FORMAT,
        "task": "bench",
        "benchmark": document["benchmark"],
        "model": Path(str(model)).name,
        "settings": document["settings"],
        "command": f"specache {run.command}",
        "origins": [origin],
        "results": rows,
    }


def _models(assignments: list[str]) -> dict[str, str]:
    models = {}
    for assignment in assignments:
        name, equals, path = assignment.partition("=")
        if not equals or not name or not Path(path).expanduser().exists():
            raise RunListError(f"--model {assignment}: write NAME=PATH, of a file or folder that exists.")
        models[name] = str(Path(path).expanduser())
    return models


def _variables(run: ListedRun) -> str:
    return "make results " + " ".join(f"{name.upper()}=PATH" for name in run.needs)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()
