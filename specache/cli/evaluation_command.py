"""Make commands from tasks: a task's fields are options, beside those of every evaluation."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specache.cli import options
from specache.cli.field_command import field_parameters, make_command, take, take_fields, written_parameters
from specache.cli.json_file import JsonFile
from specache.cli.models import Dtype
from specache.cli.template_option import TemplateVariables
from specache.eval import catalogue
from specache.eval.setting_fields import field_types

if TYPE_CHECKING:
    from specache.eval.methods_option import NamedMethod

ABLATE = "ablate"
DEFAULT_METHODS = "full,specache,kivi"
DEFAULT_SWEPT = "full,specache"
_RUN_PANEL = "Run"
_TASK_PANEL = "Task"
_SWEEP_PANEL = "Sweep"
_ALSO_TASK_FIELDS = ("seed", "offline", "revision")  # a task's field of this name takes the shared option's value

Methods = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="LIST",
        rich_help_panel=_RUN_PANEL,
        help="Methods with settings: full,specache:bits=1:policy=speculative,kivi. See 'specache eval list'.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", rich_help_panel=_RUN_PANEL, help="Folder for results. A stopped run goes on there.")
]
Seed = Annotated[int, typer.Option("--seed", rich_help_panel=_RUN_PANEL, help="Decides random items and the confidence intervals.")]
Field = Annotated[str, typer.Option("--field", rich_help_panel=_SWEEP_PANEL, help="The setting to sweep, for example top_k.")]
FieldValues = Annotated[
    str,
    typer.Option(
        "--values", metavar="LIST", rich_help_panel=_SWEEP_PANEL, help="Its values: 0,16,32,64 (top_k 0: the low-bit copy alone)."
    ),
]
TaskName = Annotated[
    str, typer.Option("--task", metavar="TASK", rich_help_panel=_SWEEP_PANEL, help="The task that measures; its options follow.")
]


@dataclass(frozen=True, kw_only=True)
class SharedOptions(options.LoadOptions):
    """Options of every evaluation."""

    model: options.Model
    out: Out
    methods: Methods = DEFAULT_METHODS
    json: JsonFile = None
    seed: Seed = 0
    system: options.System = None
    chat_template_kwargs: TemplateVariables = None
    dtype: options.DtypeOption = Dtype.FLOAT32


@dataclass(frozen=True)
class SweepOptions:
    """Further options of `ablate`."""

    field: Field
    values: FieldValues
    task: TaskName


RunTask = Callable[[SharedOptions, Any, "list[NamedMethod]"], None]


def task_command(name: str, cls: Any, run: RunTask) -> Any:
    """Return the command of a task."""

    def command(**values: Any) -> None:
        from specache.eval.methods_option import parse_methods

        shared = take(SharedOptions, values)
        run(shared, make_task(cls, values, shared), parse_methods(shared.methods))

    return make_command(name, cls.summary, command, [*written_parameters(SharedOptions), *_task_parameters(cls, SharedOptions)])


def ablate_command(task: str, run: RunTask) -> Any:
    """Return the command that sweeps a setting over `task`."""
    from specache.eval.tasks.ablate import Ablate, canonical_field, sweep

    cls = catalogue.task_class(task) if task in catalogue.TASKS else None

    def command(**values: Any) -> None:
        shared, swept = take(SharedOptions, values), take(SweepOptions, values)
        inner = make_task(catalogue.task_class(swept.task), values, shared)
        methods = sweep(shared.methods, swept.field, swept.values)
        run(shared, Ablate(inner, canonical_field(shared.methods, swept.field)), methods)

    defaults = {"methods": DEFAULT_SWEPT, "task": task}
    parameters = [*written_parameters(SharedOptions, defaults), *written_parameters(SweepOptions, defaults)]
    own = _task_parameters(cls, SharedOptions, SweepOptions) if cls else []
    return make_command(ABLATE, Ablate.summary, command, [*parameters, *own])


def make_task(cls: Any, values: dict[str, Any], shared: SharedOptions) -> Any:
    """Return a task from the values of its options.

    Raises:
        ConfigError: a value is invalid.
    """
    given = {name: getattr(shared, name) for name in field_types(cls) if name in _ALSO_TASK_FIELDS}
    return take_fields(cls, {name: value for name, value in values.items() if name not in given}, given)


def _task_parameters(cls: Any, *taken_by: Any) -> list[inspect.Parameter]:
    """Return one option per field of a task, unless a shared option has its name."""
    taken = {field.name for options in taken_by for field in dataclasses.fields(options)}
    return field_parameters(cls, _TASK_PANEL, taken, _ALSO_TASK_FIELDS)
