"""Read LongBench's records, from a folder of its jsonl files or from the hub."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specache.errors import TaskDataError
from specache.eval.tasks.texts import parse_jsonl, read_jsonl, record_field

HUB_REPOSITORY = "THUDM/LongBench"
HUB_FILE = "data.zip"

Reader = Callable[[str], Iterator["Record"]]


@dataclass(frozen=True)
class Record:
    """One example of a subset."""

    context: str
    input: str
    answers: list[str]
    classes: list[str]


def folder_reader(folder: Path) -> Reader:
    """Return a reader of `NAME.jsonl` in a folder, or in its subfolder `data`.

    The subfolder is that of the benchmark's own archive.

    Raises:
        TaskDataError: it is not a folder; when reading, a file is missing or malformed.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise TaskDataError(f"--data {folder} is not a folder; expected one that holds LongBench's files, like hotpotqa.jsonl.")

    def read(subset: str) -> Iterator[Record]:
        names = [folder / f"{subset}.jsonl", folder / "data" / f"{subset}.jsonl"]
        path = next((path for path in names if path.is_file()), None)
        if path is None:
            raise TaskDataError(f"{folder} has no {subset}.jsonl. Leave {subset} out with --subsets, or add the file.")
        for number, record in read_jsonl(path):
            yield parse_record(record, f"{path}, line {number}")

    return read


def hub_reader() -> Reader:
    """Return a reader of the benchmark's archive on the hub.

    The archive is downloaded once into the hub's cache.

    Raises:
        TaskDataError: it is not in the cache and cannot be downloaded; when reading, it is
            malformed.
    """
    archive = _download()

    def read(subset: str) -> Iterator[Record]:
        origin = f"{subset}.jsonl in {HUB_REPOSITORY}/{HUB_FILE}"
        try:
            with zipfile.ZipFile(archive) as files:
                member = next((name for name in files.namelist() if name.split("/")[-1] == f"{subset}.jsonl"), None)
                if member is None:
                    raise TaskDataError(f"there is no {origin}.")
                with files.open(member) as lines:
                    for number, record in parse_jsonl(lines, origin):
                        yield parse_record(record, f"{origin}, line {number}")
        except (OSError, zipfile.BadZipFile) as error:
            raise TaskDataError(f"{archive} is broken ({error}). Delete it to download it again.") from None

    return read


def parse_record(record: dict[str, Any], where: str) -> Record:
    """Make a record from its JSON object.

    `answers` and `all_classes` may be lists, JSON text of a list, or null, as exported files have
    them.

    Raises:
        TaskDataError: a field is missing or of the wrong type. `where` says which file and line.
    """
    answers = _strings(record_field(record, "answers", (list, str), where), "answers", where)
    if not answers:
        raise TaskDataError(f"{where}: 'answers' is empty.")
    return Record(
        context=record_field(record, "context", str, where),
        input=record_field(record, "input", str, where),
        answers=answers,
        classes=_strings(record.get("all_classes"), "all_classes", where),
    )


def _strings(value: Any, name: str, where: str) -> list[str]:
    if isinstance(value, str):
        value = _list_in(value)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TaskDataError(f"{where}: {name!r} must be a list of strings.")
    return value


def _list_in(text: str) -> list[Any] | None:
    """Parse text as the JSON of a list or null. Other text becomes the only member of a list."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return [text]
    return value if value is None or isinstance(value, list) else [text]


def _download() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset"))
    except Exception as error:  # the hub raises many types; all mean that there is no file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TaskDataError(
            f"cannot download LongBench ({HUB_REPOSITORY}) from the hub: {reason} Pass --data FOLDER with its jsonl files instead."
        ) from error
