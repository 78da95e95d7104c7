"""Read texts and JSON lines from files, and encode prompts, for all tasks."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from specache.errors import ConfigError, TaskDataError
from specache.platform.text_files import read_text, utf8_lines
from specache.templates.template import ChatTemplate


def load_text(paths: tuple[Path, ...]) -> str:
    """Return the files' texts, joined, or Python's own documentation without files.

    The documentation's topics are in alphabetical order.

    Raises:
        TaskDataError: a file is missing, empty or not UTF-8 text, or this Python comes without its
            documentation.
    """
    if not paths:
        return _python_documentation()
    return "\n\n".join(map(_read_text, paths))


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and record of each line of a `.jsonl` or `.jsonl.gz` file.

    Raises:
        TaskDataError: the file is missing, empty, or malformed. The message names file and line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path.expanduser(), "rb") as lines:
            yield from parse_jsonl(lines, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise TaskDataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def parse_jsonl(lines: Iterable[bytes], origin: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and record of each line that is not blank.

    Raises:
        TaskDataError: a line is not a JSON object in UTF-8, or there is no line.
    """
    found = False
    for number, line in enumerate(utf8_lines(lines), 1):
        if not line.strip():
            continue
        found = True
        try:
            record = json.loads(line.decode("utf-8").rstrip())
        except UnicodeDecodeError as error:
            raise TaskDataError(f"{origin}, line {number}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
        except json.JSONDecodeError as error:
            raise TaskDataError(f"{origin}, line {number}: not JSON ({error.msg} at column {error.colno}).") from None
        if not isinstance(record, dict):
            raise TaskDataError(f"{origin}, line {number}: expected a JSON object, got {type(record).__name__}.")
        yield number, record
    if not found:
        raise TaskDataError(f"{origin} is empty; expected one JSON object per line.")


def record_field(record: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return one field of a record, of the expected type.

    Raises:
        TaskDataError: it is missing or of another type. `where` says which file and line.
    """
    if key not in record:
        raise TaskDataError(f"{where}: the field {key!r} is missing; there are {', '.join(map(repr, record)) or 'none'}.")
    value = record[key]
    if not isinstance(value, kind):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise TaskDataError(f"{where}: the field {key!r} is {type(value).__name__}, expected {expected}.")
    return value


def encode_prompt(template: ChatTemplate, text: str, *, chat: bool, answer_prefix: str = "") -> list[int]:
    """Return the token ids of a prompt.

    With `chat` and a chat template, the text is a user's message, else it is used as it is.

    Args:
        answer_prefix: the beginning of the answer, which is part of the prompt.
    """
    if chat and template.exists:
        return template.encode(template.ask(text), answer_prefix=answer_prefix)
    return list(template.tokenizer(text + answer_prefix)["input_ids"])


def shared_prefix(prompts: Sequence[list[int]]) -> int:
    """Return the number of leading tokens that all prompts of one document share.

    At least one token is left to run. It is 0 for a single prompt.
    """
    if len(prompts) < 2:
        return 0
    first, *others = prompts
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if any(other[i] != first[i] for other in others)), limit)


def check_length(tokens: int, positions: int | None, what: str) -> None:
    """Check that prompt and answer fit the model.

    Raises:
        ConfigError: they do not.
    """
    if positions is not None and tokens > positions:
        raise ConfigError(f"{what} needs {tokens:,} tokens with its answer, but the model has {positions:,} positions.")


def check_at_least(options: Any, smallest: int, *names: str) -> None:
    """Check that these options of a task, numbers or tuples of numbers, are at least `smallest`.

    Raises:
        ConfigError: one is smaller, or a tuple is empty.
    """
    for name in names:
        value = getattr(options, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or min(numbers) < smallest:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}.")


def check_distinct(options: Any, *names: str) -> None:
    """Check that these options of a task have no value twice.

    Raises:
        ConfigError: one has.
    """
    for name in names:
        values = getattr(options, name)
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise ConfigError(f"--{name.replace('_', '-')} names {twice} twice.")


def json_settings(task: Any) -> dict[str, Any]:
    """Return a task's fields, JSON-ready."""
    return {field.name: _plain(getattr(task, field.name)) for field in fields(task)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _read_text(path: Path) -> str:
    text = read_text(path, TaskDataError)
    if not text.strip():
        raise TaskDataError(f"{path} is empty.")
    return text


def _python_documentation() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TaskDataError(
            "this Python comes without its documentation (pydoc_data), the text used by default. Pass files, or use a full Python."
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))
