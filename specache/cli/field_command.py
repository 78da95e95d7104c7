"""Make commands from dataclasses: the fields of a task or a benchmark become its options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, get_type_hints

import typer
from typer.main import get_command as build_command

from specache.cli.byte_sizes import parse_size
from specache.cli.console import reports_errors
from specache.errors import ConfigError
from specache.eval.setting_fields import field_types, flag, is_tuple, parse, shown
from specache.platform.text_files import typed_text


def make_command(name: str, help: str, function: Callable[..., None], parameters: list[inspect.Parameter]) -> Any:
    """Return a click command with these options, the required ones first."""
    _sign(function, sorted(parameters, key=lambda parameter: parameter.default is not inspect.Parameter.empty))
    sub = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    sub.command(name, help=help, context_settings={"help_option_names": ["-h", "--help"]})(reports_errors(function))
    command = build_command(sub)
    command.name = name
    return command


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Expand parameters that are dataclasses of `written_parameters` into options for typer."""
    signature = inspect.signature(command, eval_str=True)
    groups = {one.name: one.annotation for one in signature.parameters.values() if dataclasses.is_dataclass(one.annotation)}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += written_parameters(groups[parameter.name]) if parameter.name in groups else [parameter]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        taken = {name: take(cls, values) for name, cls in groups.items()}
        command(**taken, **{name: value for name, value in values.items() if name in signature.parameters})

    _sign(with_options, parameters)
    return with_options


def written_parameters(cls: Any, defaults: dict[str, Any] | None = None) -> list[inspect.Parameter]:
    """Return the options of a dataclass whose fields are annotated with `typer.Option`."""
    hints = get_type_hints(cls, include_extras=True)
    defaults = defaults or {}
    return [_parameter(one.name, hints[one.name], defaults.get(one.name, one.default)) for one in dataclasses.fields(cls)]


def field_parameters(cls: Any, panel: str, taken: Collection[str] = (), shared: Collection[str] = ()) -> list[inspect.Parameter]:
    """Return one option per field of a plain dataclass, with the field's `help`.

    A field whose metadata has `bytes` is parsed as a size (2GB).

    Args:
        taken: names of options that the command already has.
        shared: names among them whose value is also passed to a field of this name.
    """
    kinds = field_types(cls)
    parameters = []
    for field in dataclasses.fields(cls):
        if field.name not in kinds or (field.name in taken and field.name in shared):
            continue
        if field.name in taken:
            raise TypeError(
                f"{cls.__name__}.{field.name} has the name of an option that the command has already. Rename the field."
            )
        parameters.append(_field_parameter(field, kinds[field.name], panel))
    return parameters


def take(cls: Any, values: dict[str, Any]) -> Any:
    """Return a dataclass of `written_parameters` from the values of a command's options."""
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


def take_fields(cls: Any, values: dict[str, Any], given: dict[str, Any] | None = None) -> Any:
    """Return a dataclass of `field_parameters` from the values of a command's options.

    Args:
        given: fields whose values come from elsewhere.

    Raises:
        ConfigError: a value is invalid.
    """
    kinds = field_types(cls)
    fields = dict(given or {})
    sizes = {field.name for field in dataclasses.fields(cls) if field.metadata.get("bytes")}
    for name, value in values.items():
        if name in sizes and value is not None:
            fields[name] = parse_size(value, f"--{flag(name)}")
        elif name in kinds and is_tuple(kinds[name]) and value is None:
            continue  # not given: the field's own default
        elif name in kinds:
            if isinstance(value, str) and is_tuple(kinds[name]):
                if not value.strip():
                    raise ConfigError(f"--{flag(name)} is empty. Name at least one, or leave the option out for its default.")
                fields[name] = parse(value, kinds[name], f"--{flag(name)}")
            else:
                fields[name] = typed_text(value, f"--{flag(name)}", ConfigError) if type(value) is str else value
    return cls(**fields)


def _sign(function: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Set a function's signature to these parameters."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _field_parameter(field: dataclasses.Field[Any], kind: Any, panel: str) -> inspect.Parameter:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    switch = f"--{flag(field.name)}/--no-{flag(field.name)}" if kind is bool else f"--{flag(field.name)}"
    metavar = None
    if field.metadata.get("bytes"):
        kind, metavar = str | None, "BYTES"
    elif is_tuple(kind):
        kind, metavar = str | None, "LIST"
        default = (shown(default) or None) if isinstance(default, tuple) else default
    option = typer.Option(switch, help=field.metadata.get("help"), metavar=metavar, rich_help_panel=panel)
    return _parameter(field.name, Annotated[kind, option], default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    missing = default is dataclasses.MISSING
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if missing else default, annotation=annotation
    )
