"""`--chat-template-kwargs`: variables for the model's chat template."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from specache.cli.console import err
from specache.errors import ConfigError
from specache.platform.text_files import TextError, check_text
from specache.templates.template import ChatTemplate

TemplateVariables = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        help="""Variables for the model's chat template, a JSON object: '{"enable_thinking": false}'.""",
        metavar="JSON",
    ),
]


def parse_variables(text: str | None) -> dict[str, Any] | None:
    """The variables that `--chat-template-kwargs` names, or `None` where it was not given.

    Raises:
        ConfigError: it is no JSON object, or names something that the template is given anyway.
    """
    if text is None:
        return None
    example = """for example '{"enable_thinking": false}'"""
    try:
        variables = json.loads(text, parse_constant=_refuse_constant)
        check_text(json.dumps(variables, ensure_ascii=False), "it", TextError)
    except (json.JSONDecodeError, RecursionError, TextError) as error:
        said = "too deep" if isinstance(error, RecursionError) else str(error).rstrip(".")
        if isinstance(error, json.JSONDecodeError):
            said = f"{error.msg} at column {error.colno}"
        raise ConfigError(f"--chat-template-kwargs is not JSON ({said}). Write an object, {example}.") from None
    if not isinstance(variables, dict):
        raise ConfigError(f"--chat-template-kwargs must be a JSON object, {example}; got {text[:60]}.")
    ChatTemplate(None, variables)
    return variables


def _refuse_constant(name: str) -> None:
    """Python reads NaN and Infinity; a session could not be read with them."""
    raise TextError(f"{name} is no number of JSON")


def check_variables(template: ChatTemplate) -> None:
    """Say which variables the template does not know: it ignores them."""
    for name in template.unknown_variables:
        note = f"The model's chat template knows no variable {name!r}; it has no effect."
        err.print(note, style="yellow", markup=False, soft_wrap=True)
