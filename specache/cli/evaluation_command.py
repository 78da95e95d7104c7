"""From a task's dataclass to a command: its fields are options, beside those that every evaluation has."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command as build_command

from specache.cli import options
from specache.cli.console import reports_errors
from specache.cli.models import Device, Dtype
from specache.eval import registry
from specache.eval.settings import field_types, flag, is_tuple, parse, shown

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
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", rich_help_panel=_RUN_PANEL, help="Write rows and run as JSON ('-': standard output)."),
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


@dataclass(frozen=True)
class SharedOptions:
    """What every evaluation is told."""

    model: options.Model
    out: Out
    methods: Methods = DEFAULT_METHODS
    json: JsonFile = None
    seed: Seed = 0
    dtype: options.DtypeOption = Dtype.FLOAT32
    device: options.DeviceOption = Device.AUTO
    threads: options.Threads = None
    revision: options.Revision = None
    offline: options.Offline = False


@dataclass(frozen=True)
class SweepOptions:
    """What `ablate` is told besides."""

    field: Field
    values: FieldValues
    task: TaskName


RunTask = Callable[[SharedOptions, Any, "list[NamedMethod]"], None]


def task_command(name: str, cls: Any, run: RunTask) -> Any:
    """The command of a task."""

    def command(**values: Any) -> None:
        from specache.eval.methods_option import parse_methods

        shared = _take(SharedOptions, values)
        run(shared, make_task(cls, values, shared), parse_methods(shared.methods))

    return _command(name, cls.summary, command, [*_parameters(SharedOptions), *_task_parameters(cls, SharedOptions)])


def ablate_command(task: str, run: RunTask) -> Any:
    """The command that sweeps a setting over `task`."""
    from specache.eval.tasks.ablate import Ablate, canonical_field, sweep

    cls = registry.task_class(task) if task in registry.TASKS else None

    def command(**values: Any) -> None:
        shared, swept = _take(SharedOptions, values), _take(SweepOptions, values)
        inner = make_task(registry.task_class(swept.task), values, shared)
        methods = sweep(shared.methods, swept.field, swept.values)
        run(shared, Ablate(inner, canonical_field(shared.methods, swept.field)), methods)

    defaults = {"methods": DEFAULT_SWEPT, "task": task}
    parameters = [*_parameters(SharedOptions, defaults), *_parameters(SweepOptions, defaults)]
    own = _task_parameters(cls, SharedOptions, SweepOptions) if cls else []
    return _command(ABLATE, Ablate.summary, command, [*parameters, *own])


def make_task(cls: Any, values: dict[str, Any], shared: SharedOptions) -> Any:
    """A task from the values of its options; raises `ConfigError` for one that does not fit."""
    kinds = field_types(cls)
    fields = {name: getattr(shared, name) for name in kinds if name in _ALSO_TASK_FIELDS}
    for name, value in values.items():
        if name in kinds:
            written_out = isinstance(value, str) and is_tuple(kinds[name])
            fields[name] = parse(value, kinds[name], f"--{flag(name)}") if written_out else value
    return cls(**fields)


def _command(name: str, help: str, function: Callable[..., None], parameters: list[inspect.Parameter]) -> Any:
    """A click command with these options. Required ones go first, as in any signature."""
    ordered = sorted(parameters, key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    function.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    sub = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    sub.command(name, help=help, context_settings={"help_option_names": ["-h", "--help"]})(reports_errors(function))
    command = build_command(sub)
    command.name = name
    return command


def _parameters(cls: Any, defaults: dict[str, Any] | None = None) -> list[inspect.Parameter]:
    hints = inspect.get_annotations(cls, eval_str=True)
    defaults = defaults or {}
    return [_parameter(one.name, hints[one.name], defaults.get(one.name, one.default)) for one in dataclasses.fields(cls)]


def _task_parameters(cls: Any, *taken_by: Any) -> list[inspect.Parameter]:
    """One option per field of a task, unless a shared option of that name serves it."""
    taken = {field.name for options in taken_by for field in dataclasses.fields(options)}
    kinds = field_types(cls)
    parameters = []
    for field in dataclasses.fields(cls):
        if field.name not in kinds or (field.name in taken and field.name in _ALSO_TASK_FIELDS):
            continue
        if field.name in taken:
            raise TypeError(f"{cls.__name__}.{field.name} has the name of an option that every evaluation has. Rename the field.")
        parameters.append(_task_parameter(field, kinds[field.name]))
    return parameters


def _task_parameter(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    switch = f"--{flag(field.name)}/--no-{flag(field.name)}" if kind is bool else f"--{flag(field.name)}"
    metavar = None
    if is_tuple(kind):
        kind, metavar = str | None, "LIST"
        default = shown(default) if isinstance(default, tuple) else default
    option = typer.Option(switch, help=field.metadata.get("help"), metavar=metavar, rich_help_panel=_TASK_PANEL)
    return _parameter(field.name, Annotated[kind, option], default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    missing = default is dataclasses.MISSING
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if missing else default, annotation=annotation
    )


def _take(cls: Any, values: dict[str, Any]) -> Any:
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
