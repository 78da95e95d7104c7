"""`--session`: keep a command's cache in a session's folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specache.cli.console import interrupts_deferred, print_note
from specache.cli.models import LoadedModel
from specache.cli.prompts import Message
from specache.cli.rereading import StoredPrompt, common_length, note_on_stored
from specache.cli.tier_notice import print_disk_choice
from specache.config import SlowTierKind, SpeCacheConfig
from specache.errors import ConfigError
from specache.templates.template import ChatTemplate

if TYPE_CHECKING:
    from specache import SpeCache

SESSION_PANEL = "Session"

SessionName = Annotated[
    str | None,
    typer.Option(
        "--session",
        help="Keep what was read and answered in a session of this name, and go on from it: only what is new is read. Saved after "
        "each prompt and each answer. See 'specache session'.",
        metavar="NAME",
        rich_help_panel=SESSION_PANEL,
    ),
]
SessionDir = Annotated[
    Path | None,
    typer.Option(
        "--session-dir",
        help="The folder of sessions. Default: DIR of --slow-tier disk:DIR, or 'sessions' in the cache folder that 'specache "
        "doctor' shows.",
        metavar="DIR",
        rich_help_panel=SESSION_PANEL,
    ),
]


@dataclass(frozen=True)
class Place:
    """A session that a command uses: its name and root folder."""

    name: str
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def settings(self, config: SpeCacheConfig, context: typer.Context) -> SpeCacheConfig:
        """Return the command's settings; those not given on the command line come from the session.

        Raises:
            SessionError: the session is damaged.
        """
        from specache import sessions

        stored = sessions.stored_config(self.name, self.root)
        if stored is not None:
            names = [field.name for field in fields(SpeCacheConfig) if field.name not in ("slow_tier", "slow_dir")]
            typed = [name for name in names if _is_typed(context, name)]
            if "top_k" in typed:  # it is meant at every length, unless long_top_k was typed too
                typed.append("long_top_k")
            config = replace(stored, **{name: getattr(config, name) for name in typed})
        return config.with_changes(slow_tier=SlowTierKind.DISK, slow_dir=str(self.root))


def place(name: str | None, folder: Path | None, config: SpeCacheConfig, prompts: int) -> Place | None:
    """Return the session of a command; None if it uses none.

    Raises:
        ConfigError: the options contradict each other.
    """
    from specache.sessions.names import check_name, root_of, session_root

    if name is None:
        if folder is not None:
            raise ConfigError("--session-dir needs --session NAME.")
        return None
    check_name(name)
    if prompts > 1:
        raise ConfigError(f"--session holds one sequence, and there are {prompts} prompts. Use a session for each of them.")
    if config.slow_tier not in (SlowTierKind.AUTO, SlowTierKind.DISK):
        raise ConfigError(
            f"--slow-tier {config.slow_tier} is not for sessions: their pairs are on disk. Leave it out, or use disk:DIR."
        )
    given = None if config.slow_dir is None else Path(config.slow_dir)
    if folder is not None and given is not None and session_root(folder) != session_root(given):
        raise ConfigError(f"--session-dir {folder} and --slow-tier disk:{given} name two folders. Leave one of them out.")
    return Place(name, root_of(name, folder or given))


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


class OpenedCache:
    """The cache of a command, and its session, if there is one.

    Args:
        loaded: model and tokenizer.
        config: the cache's settings.
        place: the session; None for none.
        variables: variables of the chat template; None uses those of the session.

    Attributes:
        cache: the cache to pass as `past_key_values`.
        messages: the session's saved conversation.
        template: the chat template; a session's conversation keeps the date that it began with.
        stored: what the session held when it was opened; None once a prompt was compared with it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: SpeCacheConfig,
        place: Place | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        import specache

        self._loaded = loaded
        self._config = config
        self._session: specache.Session | None = None
        self.messages: list[Message] = []
        self.stored: StoredPrompt | None = None
        self._is_noted = False
        if place is None:
            self.template = ChatTemplate(loaded.tokenizer, variables)
            self.cache = self._new_cache()
            return
        self.template = ChatTemplate(loaded.tokenizer, variables)  # invalid variables are refused before the session is opened
        self._session = session = specache.Session(place.name, loaded.model, config, tokenizer=loaded.tokenizer, folder=place.root)
        self.cache = session.cache
        self.messages = list(session.messages)
        if session.token_ids:
            before = session.rendering
            self.template = ChatTemplate(
                loaded.tokenizer,
                before.variables if variables is None and before is not None else variables,
                date=datetime.fromisoformat(before.date) if before else datetime.fromtimestamp(session.created or time.time()),
            )
            self.stored = StoredPrompt(place.name, session.token_ids, self.messages, before)

    def note_rereading(self, prompt: Sequence[int], messages: Sequence[Message]) -> None:
        """Print a note before a prompt that reuses few stored tokens, unless printed before."""
        if self.stored is None:
            note = note_on_stored(self.cache, list(prompt))
        else:
            note = self.stored.note(prompt, messages, self.template)
        if note is not None:
            if not self._is_noted:
                print_note(note)
            self.stored = None
        self._is_noted = False

    def note_if_nothing_reused(self, reused: int) -> None:
        """Print a note after the first prompt if nothing was reused and no note explained it."""
        if self.stored is not None and reused == 0:
            print_note(self.stored.nothing_reused())
        self.stored = None

    def save(self, messages: Sequence[Message]) -> None:
        """Save the cache and the conversation that it holds (none for raw text).

        Do nothing without a session.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed meanwhile. The state is saved anyway, unless it
                was pressed twice.
        """
        from specache.sessions.manifest import Rendering

        if self._session is None:
            return
        template = self.template
        with interrupts_deferred():
            self._session.messages = list(messages)
            self._session.rendering = (
                Rendering(template.date.isoformat(), template.digest, template.variables) if messages else None
            )
            self._session.save()

    def keep_beginning(self, prompt: Sequence[int]) -> None:
        """Forget the stored tokens behind the common beginning with a prompt.

        The user knows already.
        """
        self.stored, self._is_noted = None, True
        if self._session is not None:
            self._session.cut(common_length(self._session.token_ids, prompt))

    def clear(self) -> None:
        """Forget the cache's content.

        The next message begins a new conversation, with today's date.
        """
        self.stored = None
        self.template = ChatTemplate(self._loaded.tokenizer, self.template.variables)
        if self._session is not None:
            self._session.cut(0)
        else:
            self.cache.close()
            self.cache = self._new_cache()

    def close(self) -> None:
        """Free the cache and close the session."""
        (self._session or self.cache).close()

    def _new_cache(self) -> SpeCache:
        import specache

        cache = specache.SpeCache(self._loaded.model, self._config)
        cache.on_disk_chosen = print_disk_choice
        return cache

    def __enter__(self) -> OpenedCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
