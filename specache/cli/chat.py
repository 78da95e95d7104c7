"""`specache chat`: a conversation in the terminal."""

from __future__ import annotations

from dataclasses import fields

import typer
from rich.markup import escape
from rich.table import Table

from specache.cli import cache_options, options, session_option, template_option
from specache.cli.answering import Outcome
from specache.cli.chat_input import LEAVING, ChatInput, Entry, file_and_message, read_file
from specache.cli.console import err, print_error, print_note, reports_errors, write
from specache.cli.conversation import Conversation, ConversationFullError
from specache.cli.field_command import takes_options
from specache.cli.flags import in_flags
from specache.cli.prompts import PromptError
from specache.cli.reasoning import ReasoningDisplay, reasoning_note
from specache.cli.standard_streams import OutputError
from specache.cli.stats_table import rate, statistics_table, times
from specache.config import SpeCacheConfig
from specache.errors import ConfigError, SpeCacheError
from specache.templates.template import ChatTemplate

EPILOG = """
[bold]In the conversation[/bold]

What you paste is one message, however many lines it has, on terminals that mark it (bracketed paste).

Three quotation marks (\"\"\") begin a message of several lines, and end it.

/file PATH puts a text file in front of your next message; /file PATH MESSAGE sends both at once.

/drop forgets the older half of the turns, /drop N the N oldest: a conversation that has filled the model goes on so.

/reset starts over, /stats shows what the cache holds, /help lists all this, /exit or Ctrl-D leaves.

Ctrl-C stops an answer, and what was said of it stays in the conversation; before the answer begins it takes the message back.

At the prompt Ctrl-C drops the line, and a second one leaves.

With --session the conversation is saved after every message and every answer, and goes on the next time.

[bold]Examples[/bold]

specache chat -m demo

specache chat -m demo --session report
"""
HELP = "Commands: /file, /drop, /stats, /reset, /help, /exit. Ctrl-C stops an answer, Ctrl-D leaves."
COMMANDS = {
    '"""': "begin and end a message of several lines; pasted lines are one message anyway, where the terminal marks them",
    "/file PATH [MESSAGE]": "put a text file in front of MESSAGE, or of the next message (an empty line sends it alone)",
    "/drop [N]": "forget the N oldest turns, by default the older half; the system message stays, the rest is read again",
    "/reset": "forget everything but the system message",
    "/stats": "show what the cache holds",
    "/help": "show this",
    "/exit, Ctrl-D": "leave; with --session the conversation goes on the next time",
    "Ctrl-C": "stop the answer; at the prompt: drop the line, twice: leave",
}
EXPECTED_NEW_TOKENS = 2000  # in all answers of a conversation, about
SHOWN_MESSAGES, SHOWN_CHARACTERS = 6, 400  # earlier messages shown at the start: the last ones, and the beginning of each


@reports_errors
@takes_options
def chat(
    context: typer.Context,
    model: options.Model,
    *,
    system: options.System = None,
    chat_template_kwargs: template_option.TemplateVariables = None,
    generation: options.GenerationOptions,
    cache: cache_options.CacheOptions,
    session: session_option.SessionName = None,
    session_dir: session_option.SessionDir = None,
    loading: options.LoadOptions,
) -> None:
    """Talk with a model.

    Every turn continues from the same low-bit cache, so only new text is read.
    """
    config = cache.config()
    arguments = generation.arguments()
    system = options.system_text(system)
    stops = generation.stops()
    variables = template_option.parse_variables(chat_template_kwargs)
    place = session_option.place(session, session_dir, config, 1)
    if place is not None:
        config = place.settings(config, context)

    options.keep_memory_bounded(config)
    loaded = loading.load(model, f"Loading {model}", config, new_tokens=EXPECTED_NEW_TOKENS)
    generation.set_seed()
    if not ChatTemplate(loaded.tokenizer).exists:
        raise ConfigError(f"{loaded.name} has no chat template. Use 'specache generate --raw' with this model.")
    with session_option.OpenedCache(loaded, config, place, variables) as opened:
        template_option.check_variables(opened.template)
        _talk(Conversation(loaded, opened, arguments, stops=stops, system=system))


def _talk(conversation: Conversation) -> None:
    err.print(HELP, style="dim")
    _show_earlier(conversation)
    entries, files = ChatInput(), list[str]()
    goes_on = True
    while goes_on:
        try:
            entry = entries.read()
            goes_on = entry is not None and _execute(conversation, entries, files, entry)
        except PromptError as error:
            _print_error(error)
        except KeyboardInterrupt:  # between two steps; the current action is complete or undone
            err.print()
            err.print(LEAVING, style="dim")
    if files and entry is None:  # no message follows that could include them
        _send(conversation, entries, _taken(files))


def _show_earlier(conversation: Conversation) -> None:
    """Print the end of the earlier conversation, if the session has one."""
    earlier = [message for message in conversation.messages if message["role"] != "system"]
    if len(earlier) > SHOWN_MESSAGES:
        err.print(f"[{len(earlier) - SHOWN_MESSAGES} earlier messages]", style="dim", markup=False)
    for message in earlier[-SHOWN_MESSAGES:]:
        prompt = "> " if message["role"] == "user" else ""
        err.print(f"{prompt}{_shortened(message['content'])}", style="dim", markup=False)
    if conversation.unanswered is not None:
        err.print(f"Not answered: {_shortened(conversation.unanswered)}", style="dim", markup=False)


def _shortened(text: str) -> str:
    left = len(text) - SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:SHOWN_CHARACTERS]} [and {left:,} characters]"


def _execute(conversation: Conversation, entries: ChatInput, files: list[str], entry: Entry) -> bool:
    """Execute a command, or send a message with the files in front of it.

    Return True if the conversation continues.

    Raises:
        PromptError: the command is malformed, or its file cannot be read.
    """
    command, _, arguments = ("", "", "") if entry.is_message else entry.text.partition(" ")
    match command:
        case "" if not entry.text and not files:
            pass
        case "/exit" | "/quit" if not arguments:
            return False
        case "/reset" if not arguments:
            files.clear()
            _reset(conversation)
        case "/stats" if not arguments:
            err.print(statistics_table(conversation.cache.stats(), conversation.cache.config.to_dict()))
        case "/drop":
            _drop(conversation, _turns_named(arguments, conversation.turns))
        case "/file":
            path, message = file_and_message(arguments)
            files.append(read_file(path))
            if message:
                _send(conversation, entries, _taken(files, message))
            else:
                err.print(f"{path}: {len(files[-1]):,} characters, in front of your next message.", style="dim", markup=False)
        case _ if command.startswith("/") and not arguments:
            err.print(_command_table())
        case _:
            _send(conversation, entries, _taken(files, entry.text))
    return True


def _command_table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="dim")
    for command, meaning in COMMANDS.items():
        table.add_row(escape(command), meaning)
    return table


def _taken(files: list[str], message: str = "") -> str:
    """Return a message with the files in front of it, and empty the list of files."""
    parts = [*files, *([message] if message else [])]
    files.clear()
    return "\n\n".join(parts)


def _turns_named(arguments: str, turns: int) -> int:
    """Return the number of turns for `/drop` to drop: its argument, or the older half."""
    if not turns:
        raise PromptError("there is no turn to drop.")
    if not arguments.strip():
        return (turns + 1) // 2
    if not arguments.strip().isdecimal() or not 1 <= int(arguments) <= turns:
        raise PromptError(f"/drop takes the number of turns to forget, from 1 to {turns}, got {arguments.strip()!r}.")
    return int(arguments)


def _drop(conversation: Conversation, turns: int) -> None:
    left = conversation.drop(turns)
    try:
        conversation.save()
    except SpeCacheError as error:
        _print_error(error)
    dropped = "The oldest turn is" if turns == 1 else f"The {turns} oldest turns are"
    reread = f" The rest ({left:,} tokens) is read again with the next message." if left else ""
    err.print(f"{dropped} forgotten.{reread}", style="dim", soft_wrap=True)


def _send(conversation: Conversation, entries: ChatInput, text: str) -> None:
    """Answer a message. If the conversation fills the model, offer to drop the oldest turns."""
    try:
        _turn(conversation, text)
    except ConversationFullError as error:
        _print_error(error)
        turns = conversation.turns_to_drop(text)
        named = "oldest turn" if turns == 1 else f"{turns} oldest turns"
        if entries.is_terminal and entries.confirm(f"Drop the {named} and go on?"):
            _drop(conversation, turns)
            _turn(conversation, text)


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
    except (ConversationFullError, OutputError):
        display.end()
        raise
    except SpeCacheError as error:
        display.end()
        _print_error(error)
        return
    display.end()
    begun = bool(outcome.results[0].token_ids)
    try:
        if begun:
            write("\n")
    finally:
        outcome = _saved(conversation, outcome)
    if outcome.error is not None:
        _print_error(outcome.error)
    if (note := reasoning_note(outcome.results[0])) is not None:
        print_note(note)
    if outcome.interrupted and not begun:
        err.print()
        err.print("Stopped before the answer began. The message is taken back.", style="dim")
    else:
        err.print(_summary(conversation, outcome), style="dim", markup=False, soft_wrap=True)


def _saved(conversation: Conversation, outcome: Outcome) -> Outcome:
    """Save the conversation despite Ctrl-C, and return the outcome with any error."""
    try:
        conversation.save()
    except SpeCacheError as error:
        return outcome.with_error(error)
    except KeyboardInterrupt:  # pressed while saving, which is complete: there is nothing else to stop
        err.print()
    return outcome


def _print_error(error: SpeCacheError) -> None:
    print_error(in_flags(str(error), [field.name for field in fields(SpeCacheConfig)]))


def _summary(conversation: Conversation, outcome: Outcome) -> str:
    stats, result = conversation.cache.stats(), outcome.results[0]
    length = conversation.cache.get_seq_length()
    cut = ", cut at --max-new-tokens" if outcome.note is None else ", cut at the model's last position: /drop makes room"
    note = {"length": cut, "interrupted": ", stopped", "error": ", cut by the error"}.get(result.finish_reason or "", "")
    return (
        f"[{len(result.token_ids)} tokens{note}; {length:,} in the cache at {times(stats['fast_ratio'])} of 16 bits; "
        f"{rate(stats['tokens_per_s'])} tokens per second]"
    )
