"""`--chat-template-kwargs`: variables for the model's chat template."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from specache.cli.console import print_note
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
    """Return the variables of `--chat-template-kwargs`; None if it was not given.

    Raises:
        ConfigError: it is not a JSON object, or sets a reserved name.
    """
    if text is None:
        return None
    example = """for example '{"enable_thinking": false}'"""
    try:
        variables = json.loads(text, parse_constant=_refuse_constant)
        check_text(json.dumps(variables, ensure_ascii=False), "it", TextError)
    except (json.JSONDecodeError, RecursionError, TextError) as error:
        problem = "too deep" if isinstance(error, RecursionError) else str(error).rstrip(".")
        if isinstance(error, json.JSONDecodeError):
            problem = f"{error.msg} at column {error.colno}"
        raise ConfigError(f"--chat-template-kwargs is not JSON ({problem}). Write an object, {example}.") from None
    if not isinstance(variables, dict):
        raise ConfigError(f"--chat-template-kwargs must be a JSON object, {example}; got {text[:60]}.")
    ChatTemplate(None, variables)
    return variables


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python accepts but a session could not be read with."""
    raise TextError(f"{name} is no number of JSON")


def check_variables(template: ChatTemplate) -> None:
    """Print which variables the template ignores."""
    for name in template.unknown_variables:
        note = f"The model's chat template knows no variable {name!r}; it has no effect."
        print_note(note)
