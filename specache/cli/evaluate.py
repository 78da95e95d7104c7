"""`specache eval`: measure methods on tasks.

Each task's dataclass fields become the options of its command.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from specache.cli import options
from specache.cli.console import EXIT_INTERRUPTED, err, print_note, print_table, reports_errors
from specache.cli.evaluation_command import ABLATE, SharedOptions, ablate_command, task_command
from specache.cli.evaluation_report import report
from specache.cli.evaluation_table import result_tables
from specache.cli.json_file import check_json, print_json, write_json
from specache.cli.template_option import check_variables, parse_variables
from specache.errors import ConfigError
from specache.eval import catalogue
from specache.eval.results import CELLS_FILE

if TYPE_CHECKING:
    from specache.eval.methods_option import NamedMethod
    from specache.eval.runner import Outcome

HELP = "Measure methods on tasks: fidelity, needles, RULER, LongBench and more, at stated memory."
EPILOG = """
[bold]Examples[/bold]

specache eval list

specache eval fidelity -m demo --methods full,specache,specache:bits=1:policy=speculative,kivi --out results/fidelity

specache eval ablate -m demo --field top_k --values 0,16,32,64,128,256 --out results/top-k

specache eval report results/fidelity

specache eval report results/fidelity results/fidelity-of-another-commit

A run that was stopped goes on with the same command; finished cells are not measured again. More methods may be added to it.
"""


class EvaluationGroup(TyperGroup):
    """One command per task, created on demand, so that only its module is imported."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return `list` and `report`, then the tasks."""
        return [*self.commands, *catalogue.TASKS, ABLATE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a task, or one that is defined in this file."""
        if cmd_name in catalogue.TASKS:
            return task_command(cmd_name, catalogue.task_class(cmd_name), run_task)
        if cmd_name == ABLATE:
            return ablate_command(_ablated_task(ctx), run_task)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Remember the arguments: `ablate` has the options of the task that they name."""
        ctx.meta[__name__] = list(args)
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=EvaluationGroup, help=HELP, epilog=EPILOG, no_args_is_help=True)


@app.command("list")
@reports_errors
def list_all(as_json: options.Json = False) -> None:
    """Show all tasks and methods."""
    from specache.eval.setting_fields import flag
    from specache.eval.tasks.ablate import Ablate

    tasks = [{"name": name, "summary": catalogue.task_class(name).summary} for name in catalogue.TASKS]
    tasks.append({"name": ABLATE, "summary": Ablate.summary})
    methods = [_described_method(name) for name in catalogue.METHODS]
    if as_json:
        print_json({"tasks": tasks, "methods": methods})
        return
    _print_list("task", tasks)
    for method in methods:
        method["settings"] = ", ".join(flag(name) for name in method["settings"])
    _print_list("method", methods)


app.command("report")(reports_errors(report))


def run_task(shared: SharedOptions, task: Any, methods: list[NamedMethod]) -> None:
    """Run a task, print its results and write its report."""
    from specache.cli.evaluation_progress import CellProgress
    from specache.eval.plots import require_libraries
    from specache.eval.runner import MethodFailedError, evaluate
    from specache.eval.tasks.base import TaskModel

    require_libraries()
    check_json(shared.json)
    variables, system = parse_variables(shared.chat_template_kwargs), options.system_text(shared.system)
    loaded = shared.load(shared.model, f"Loading {shared.model}")
    model = TaskModel(loaded.model, loaded.tokenizer, loaded.name, loaded.quantised_to, variables or {}, system)
    _check_conversation_options(shared, task, model)
    try:
        with CellProgress() as progress:
            outcome = evaluate(model, task, methods, shared.out, seed=shared.seed, progress=progress)
    except KeyboardInterrupt:
        _say_interrupted(shared.out)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except MethodFailedError as error:
        if error.outcome.cells:
            _show(shared, task, error.outcome)
        raise
    _show(shared, task, outcome)


def _show(shared: SharedOptions, task: Any, outcome: Outcome) -> None:
    from specache.eval.report import write_report

    print_table(result_tables(outcome.run, outcome.rows))  # before any write that a full disk could fail
    if shared.json is not None:
        write_json(shared.json, outcome.to_dict())
    _show_path(write_report(shared.out, task, outcome.run, outcome.rows, outcome.cells))


def _check_conversation_options(shared: SharedOptions, task: Any, model: Any) -> None:
    """Refuse options of a conversation if the task has none."""
    for flag_name, value in (("--system", shared.system), ("--chat-template-kwargs", shared.chat_template_kwargs)):
        if value is not None and not (getattr(getattr(task, "task", task), "chat", False) and model.template.exists):
            raise ConfigError(f"{flag_name} needs a task that asks in conversations (--chat), and a model with a chat template.")
    check_variables(model.template)


def _ablated_task(ctx: Any) -> str:
    """Return the value of `--task` among the arguments of `ablate`."""
    arguments = ctx.meta.get(__name__, []) if ctx is not None else []
    for index, argument in enumerate(arguments):
        if argument == "--task" and index + 1 < len(arguments):
            return str(arguments[index + 1])
        if argument.startswith("--task="):
            return str(argument.removeprefix("--task="))
    return next(iter(catalogue.TASKS))


def _described_method(name: str) -> dict[str, Any]:
    from specache.eval.methods_option import setting_types

    cls = catalogue.method_class(name)
    return {"name": name, "summary": cls.summary, "settings": list(setting_types(cls))}


def _print_list(kind: str, entries: list[dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", title=f"{kind}s", title_style="bold")
    for key in entries[0]:
        table.add_column({"name": kind}.get(key, key), style={"settings": "dim"}.get(key, ""), overflow="fold")
    for entry in entries:
        table.add_row(*entry.values())
    out = Console(highlight=False)
    out.print(table)
    out.print()


def _show_path(path: Path) -> None:
    err.print(f"Report: {path}", style="dim", markup=False, soft_wrap=True)


def _say_interrupted(out: Path) -> None:
    finished = 0
    if (out / CELLS_FILE).exists():
        finished = (out / CELLS_FILE).read_bytes().count(b"\n")
    print_note(
        f"Interrupted. {finished} finished cells are kept in {out}; the same command goes on from there. "
        f"'specache eval report {out}' shows what there is."
    )
