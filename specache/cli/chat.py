"""`specache chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import fields

import typer

from specache.cli import options, session_option, template_option
from specache.cli.answering import Outcome
from specache.cli.compiling import compile_model
from specache.cli.console import err, print_error, quiet_libraries, reports_errors, status, write
from specache.cli.conversation import Conversation
from specache.cli.field_command import takes_options
from specache.cli.flags import in_flags
from specache.cli.models import Device, Dtype, load
from specache.cli.prompts import has_chat_template
from specache.cli.reasoning import ReasoningDisplay, reasoning_note
from specache.cli.report import rate, statistics_table, times
from specache.config import SpeCacheConfig
from specache.errors import ConfigError, SpeCacheError
from specache.weight_format import WeightFormat

EPILOG = """
[bold]In the conversation[/bold]

/stats shows what the cache holds, /reset starts over, /exit or Ctrl-D leaves.

Ctrl-C stops an answer; what was said of it stays in the conversation.

With --session the conversation is saved after every message and every answer, and goes on the next time.

[bold]Examples[/bold]

specache chat -m demo

specache chat -m demo --session report
"""
PROMPT = "> "
HELP = "Commands: /stats, /reset, /help, /exit. Ctrl-C stops an answer, Ctrl-D leaves."
SHOWN_MESSAGES, SHOWN_CHARACTERS = 6, 400  # of what was said earlier: the last messages, and the beginning of each


@reports_errors
@takes_options
def chat(
    context: typer.Context,
    model: options.Model,
    *,
    system: options.System = None,
    chat_template_kwargs: template_option.TemplateVariables = None,
    generation: options.GenerationOptions,
    cache: options.CacheOptions,
    session: session_option.SessionName = None,
    session_dir: session_option.SessionDir = None,
    dtype: options.DtypeOption = Dtype.AUTO,
    weights: options.WeightsOption = WeightFormat.AUTO,
    compile: options.Compile = False,
    device: options.DeviceOption = Device.AUTO,
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
) -> None:
    """Talk with a model. Every turn continues from the same low-bit cache, so only new text is read."""
    config = cache.config()
    arguments = generation.arguments()
    stops = generation.stops()
    variables = template_option.parse_variables(chat_template_kwargs)
    place = session_option.place(session, session_dir, config, 1)
    if place is not None:
        config = place.settings(config, context)

    quiet_libraries()
    options.set_threads(threads)
    options.keep_memory_bounded(config)
    with status(f"Loading {model}") as say:
        loaded = load(model, dtype=dtype, weights=weights, device=device, revision=revision, offline=offline, on_progress=say)
        if compile:
            compile_model(loaded.model, config, 1, say)
    generation.set_seed()
    if not has_chat_template(loaded.tokenizer):
        raise ConfigError(f"{loaded.name} has no chat template. Use 'specache generate --raw' with this model.")
    with session_option.OpenedCache(loaded, config, place, variables) as opened:
        template_option.check_variables(opened.template)
        _talk(Conversation(loaded, opened, arguments, stops=stops, system=system))


def _talk(conversation: Conversation) -> None:
    err.print(HELP, style="dim")
    _show_earlier(conversation)
    while (line := _read_line()) is not None:
        if not _obey(conversation, line):
            break


def _show_earlier(conversation: Conversation) -> None:
    """The end of what was said before, if this is a session's conversation."""
    said = [message for message in conversation.messages if message["role"] != "system"]
    if len(said) > SHOWN_MESSAGES:
        err.print(f"[{len(said) - SHOWN_MESSAGES} earlier messages]", style="dim", markup=False)
    for message in said[-SHOWN_MESSAGES:]:
        prompt = PROMPT if message["role"] == "user" else ""
        err.print(f"{prompt}{_shortened(message['content'])}", style="dim", markup=False)
    if conversation.unanswered is not None:
        err.print(f"Not answered: {_shortened(conversation.unanswered)}", style="dim", markup=False)


def _shortened(text: str) -> str:
    left = len(text) - SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:SHOWN_CHARACTERS]} [and {left:,} characters]"


def _obey(conversation: Conversation, line: str) -> bool:
    """Carry out one line. Returns whether the conversation goes on."""
    match line.strip():
        case "":
            pass
        case "/exit" | "/quit":
            return False
        case "/reset":
            _reset(conversation)
        case "/stats":
            err.print(statistics_table(conversation.cache.stats(), conversation.cache.config.to_dict()))
        case text if text.startswith("/") and len(text.split()) == 1:
            err.print(HELP, style="dim")
        case text:
            _turn(conversation, text)
    return True


def _reset(conversation: Conversation) -> None:
    conversation.reset()
    try:
        conversation.save()
    except SpeCacheError as error:
        _print_error(error)
        return
    err.print("Starting over.", style="dim")


def _turn(conversation: Conversation, text: str) -> None:
    display = ReasoningDisplay()
    try:
        outcome = conversation.say(text, on_text=display.show_text, on_reasoning=display.show)
    except SpeCacheError as error:
        display.end()
        _print_error(error)
        return
    display.end()
    write("\n")
    try:
        conversation.save()
    except SpeCacheError as error:
        outcome = outcome.with_error(error)
    if outcome.error is not None:
        _print_error(outcome.error)
    if (note := reasoning_note(outcome.results[0])) is not None:
        err.print(note, style="yellow", markup=False)
    err.print(_summary(conversation, outcome), style="dim")


def _print_error(error: SpeCacheError) -> None:
    print_error(in_flags(str(error), [field.name for field in fields(SpeCacheConfig)]))


def _summary(conversation: Conversation, outcome: Outcome) -> str:
    stats, result = conversation.cache.stats(), outcome.results[0]
    length = conversation.cache.get_seq_length()
    note = {"length": ", cut at --max-new-tokens", "interrupted": ", stopped", "error": ", cut by the error"}.get(
        result.finish_reason or "", ""
    )
    return (
        f"[{len(result.token_ids)} tokens{note}; {length:,} in the cache at {times(stats['fast_ratio'])} of 16 bits; "
        f"{rate(stats['tokens_per_s'])} tokens per second]"
    )


def _read_line() -> str | None:
    """The next line of the user; `None` at the end of input. Ctrl-C drops the line that was begun."""
    while True:
        try:
            if not sys.stdin.isatty():
                return sys.stdin.readline() or None
            _enable_line_editing()
            return input(PROMPT)
        except EOFError:
            write("\n")
            return None
        except KeyboardInterrupt:
            write("\n")
            err.print(HELP, style="dim")


def _enable_line_editing() -> None:
    """History and cursor keys for `input`, where the system has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
