"""`specache chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from specache.cli import options
from specache.cli.answering import Outcome
from specache.cli.compiling import compile_model
from specache.cli.console import err, print_error, quiet_libraries, reports_errors, status, write
from specache.cli.conversation import Conversation
from specache.cli.field_command import takes_options
from specache.cli.models import Device, Dtype, LoadedModel, load
from specache.cli.prompts import has_chat_template
from specache.cli.report import rate, statistics_table, times
from specache.config import SpeCacheConfig
from specache.errors import ConfigError, SpeCacheError
from specache.weights import WeightFormat

EPILOG = """
[bold]In the conversation[/bold]

/stats shows what the cache holds, /reset starts over, /exit or Ctrl-D leaves.

Ctrl-C stops an answer; what was said of it stays in the conversation.
"""
PROMPT = "> "
HELP = "Commands: /stats, /reset, /help, /exit. Ctrl-C stops an answer, Ctrl-D leaves."


@reports_errors
@takes_options
def chat(
    model: options.Model,
    *,
    system: options.System = None,
    generation: options.GenerationOptions,
    cache: options.CacheOptions,
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

    quiet_libraries()
    options.set_threads(threads)
    with status(f"Loading {model}") as say:
        loaded = load(model, dtype=dtype, weights=weights, device=device, revision=revision, offline=offline, on_progress=say)
        if compile:
            compile_model(loaded.model, config, 1, say)
    generation.set_seed()
    _talk(loaded, config, arguments, stops, system)


def _talk(loaded: LoadedModel, config: SpeCacheConfig, arguments: dict[str, Any], stops: list[str], system: str | None) -> None:
    if not has_chat_template(loaded.tokenizer):
        raise ConfigError(f"{loaded.name} has no chat template. Use 'specache generate --raw' with this model.")
    conversation = Conversation(loaded, config, arguments, stops=stops, system=system)
    err.print(HELP, style="dim")
    try:
        while (line := _read_line()) is not None:
            if not _obey(conversation, line):
                break
    finally:
        conversation.close()


def _obey(conversation: Conversation, line: str) -> bool:
    """Carry out one line. Returns whether the conversation goes on."""
    match line.strip():
        case "":
            pass
        case "/exit" | "/quit":
            return False
        case "/reset":
            conversation.reset()
            err.print("Starting over.", style="dim")
        case "/stats":
            err.print(statistics_table(conversation.cache.stats(), conversation.cache.config.to_dict()))
        case text if text.startswith("/") and len(text.split()) == 1:
            err.print(HELP, style="dim")
        case text:
            _turn(conversation, text)
    return True


def _turn(conversation: Conversation, text: str) -> None:
    try:
        outcome = conversation.say(text, on_text=lambda row, piece: write(piece))
    except SpeCacheError as error:
        print_error(str(error))
        return
    write("\n")
    err.print(_summary(conversation, outcome), style="dim")


def _summary(conversation: Conversation, outcome: Outcome) -> str:
    stats, result = conversation.cache.stats(), outcome.results[0]
    length = conversation.cache.get_seq_length()
    note = {"length": ", cut at --max-new-tokens", "interrupted": ", stopped"}.get(result.finish_reason or "", "")
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
