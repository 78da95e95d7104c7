"""`specache generate`: one answer, or one per prompt file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specache.cli import cache_options, options, session_option, template_option
from specache.cli.answering import Outcome, answer
from specache.cli.console import EXIT_INTERRUPTED, err, print_note, print_warning, reports_errors, write
from specache.cli.field_command import takes_options
from specache.cli.json_file import print_json
from specache.cli.models import LoadedModel
from specache.cli.prompts import Message, Prompt, answered, encode_text, read_prompts
from specache.cli.reasoning import ReasoningDisplay, reasoning_note
from specache.cli.stats_table import statistics_table
from specache.errors import ConfigError, SpeCacheError
from specache.templates.template import ChatTemplate

if TYPE_CHECKING:
    from specache import SpeCache

EPILOG = """
[bold]Examples[/bold]

specache generate -m demo --prompt "Why is the sky blue?"

(cat report.txt; echo; echo "What does the report recommend?") | specache generate -m Qwen/Qwen3-0.6B

specache generate -m ./my-model --prompt-file a.txt --prompt-file b.txt --json > answers.json

(cat report.txt; echo; echo "Who wrote it?") | specache generate -m demo --session report

specache generate -m demo --raw --prompt "Once upon a time" --temperature 0.8 --seed 7 --bits 1
"""


@reports_errors
@takes_options
def generate(
    context: typer.Context,
    model: options.Model,
    *,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="The prompt. Given several times, the prompts are a batch.", metavar="TEXT"),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompt-file",
            help="Read the prompt from a file ('-': standard input). Given several times, the files are a batch.",
            metavar="FILE",
        ),
    ] = None,
    system: options.System = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Write the prompt as a message of a conversation, where special tokens spelled in it are text, or use it as it "
            "is, special tokens included. Default: --chat if the model has a chat template.",
            show_default=False,
        ),
    ] = None,
    chat_template_kwargs: template_option.TemplateVariables = None,
    as_json: options.Json = False,
    generation: options.GenerationOptions,
    cache: cache_options.CacheOptions,
    session: session_option.SessionName = None,
    session_dir: session_option.SessionDir = None,
    loading: options.LoadOptions,
) -> None:
    """Answer a prompt, decoding over a low-bit key-value cache.

    The answer streams to standard output; progress and statistics go to standard error.
    """
    config = cache.config()
    arguments = generation.arguments()
    system = options.system_text(system)
    prompts = read_prompts(prompt or [], prompt_file or [])
    stops = generation.stops()
    variables = template_option.parse_variables(chat_template_kwargs)
    place = session_option.place(session, session_dir, config, len(prompts))
    if place is not None:
        config = place.settings(config, context)

    options.keep_memory_bounded(config)
    loaded = loading.load(model, f"Loading {model}", config, len(prompts), arguments["max_new_tokens"])
    conversations = _conversations(loaded, prompts, chat, system, variables)
    generation.set_seed()
    with session_option.OpenedCache(loaded, config, place, variables) as opened:
        outcome = _run(loaded, prompts, conversations, opened, arguments, stops, as_json, place)
    if outcome.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    outcome.raise_error()


def _conversations(
    loaded: LoadedModel, prompts: list[Prompt], chat: bool | None, system: str | None, variables: dict[str, Any] | None
) -> list[list[Message]]:
    """Return per prompt the conversation that it ends; empty for raw text."""
    template = ChatTemplate(loaded.tokenizer, system=system)
    if chat is None:
        chat = template.exists
    for flag, value in (("--system", system), ("--chat-template-kwargs", variables)):
        if value is not None and not chat:
            raise ConfigError(f"{flag} needs a conversation: leave out --raw, and use a model with a chat template.")
    return [template.ask(prompt.text) if chat else [] for prompt in prompts]


def _run(
    loaded: LoadedModel,
    prompts: list[Prompt],
    conversations: list[list[Message]],
    opened: session_option.OpenedCache,
    arguments: dict[str, Any],
    stops: list[str],
    as_json: bool,
    place: session_option.Place | None,
) -> Outcome:
    streams = len(prompts) == 1 and not as_json
    cache, template, messages = opened.cache, opened.template, conversations[0]
    if messages:
        template_option.check_variables(template)
    rows = [
        template.encode(conversation) if conversation else encode_text(loaded.tokenizer, prompt.text)
        for prompt, conversation in zip(prompts, conversations, strict=True)
    ]
    opened.note_rereading(rows[0], messages)
    display = ReasoningDisplay()
    outcome = answer(
        loaded,
        rows,
        cache,
        arguments,
        stops=stops,
        template=template if messages else None,
        on_text=display.show_text if streams else None,
        on_reasoning=display.show if streams else None,
        on_prefilled=lambda: opened.save(messages),
    )
    display.end()
    opened.note_if_nothing_reused(outcome.reused_tokens)
    try:
        opened.save(answered(messages, outcome.results[0].text) if messages else [])
    except SpeCacheError as error:  # the answer is printed anyway
        outcome = outcome.with_error(error)
    if as_json:
        _print_json(outcome, cache, loaded, place)
    elif streams:
        write("\n")
    else:
        _print_batch(outcome, prompts)
    if outcome.note is not None:
        print_warning(outcome.note)
    for note in filter(None, map(reasoning_note, outcome.results)):
        print_note(note)
    if not as_json:
        _print_summary(outcome, cache, place)
    return outcome


def _print_batch(outcome: Outcome, prompts: list[Prompt]) -> None:
    """Print answers in order on standard output, each under a heading on standard error."""
    for result, prompt in zip(outcome.results, prompts, strict=True):
        err.print(f"==> {prompt.origin} <==", style="bold", markup=False, soft_wrap=True)
        write(result.text + "\n")


def _print_summary(outcome: Outcome, cache: SpeCache, place: session_option.Place | None) -> None:
    err.print()
    for result in outcome.results:
        reason = f" ({result.finish_reason})" if result.finish_reason else ""
        err.print(f"{result.prompt_tokens:,} prompt tokens, {len(result.token_ids):,} new{reason}", style="dim")
    if place is not None:
        err.print(f"session {place.name}: {outcome.reused_tokens:,} prompt tokens were there already", style="dim", markup=False)
    err.print(statistics_table(cache.stats(), cache.config.to_dict()))


def _print_json(outcome: Outcome, cache: SpeCache, loaded: LoadedModel, place: session_option.Place | None) -> None:
    document = {
        "results": [result.to_dict() for result in outcome.results],
        "weights": loaded.weight_format,
        "config": cache.config.to_dict(),
        "stats": cache.stats(),
    }
    if place is not None:
        document["session"] = {
            "name": place.name,
            "folder": str(place.folder),
            "reused_tokens": outcome.reused_tokens,
            "tokens": cache.get_seq_length(),
        }
    if outcome.note is not None:
        document["warnings"] = [outcome.note]
    if outcome.error is not None:
        document["error"] = str(outcome.error)
    print_json(document)
