"""Convert GGUF files to safetensors once, and keep the result in the user's cache folder.

`$SPECACHE_CACHE/models/<name>-<key>` is complete or absent: a conversion is written to a temporary
folder beside it and renamed. Two processes that convert the same file take turns if the system has
file locks; else the second one discards its copy.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from specache.cli.gguf_settings import apply_settings
from specache.cli.gguf_tokenizer import correct_tokenizer
from specache.cli.loading import check_loaded
from specache.errors import SpeCacheError
from specache.platform.folders import cache_folder, earlier_cache_folder

CONVERSION_VERSION = 5  # increase it when the conversion below changes its output


class CacheFolderError(SpeCacheError):
    """The cache folder cannot be written."""


class ConversionError(SpeCacheError):
    """A GGUF file cannot be read as a model."""


def converted_model(gguf: Path, on_convert: Callable[[str], None] = lambda message: None) -> Path:
    """Return the folder of `gguf` as safetensors, converted first if it does not exist.

    Args:
        gguf: the file. It is recognised by its content, so a copy elsewhere is not converted again.
        on_convert: called with a message before anything slow.

    Raises:
        CacheFolderError: the cache folder cannot be written.
        ConversionError: the file is not a GGUF model that transformers can read.
        GgufSettingError, IncompleteModelError: transformers would run it as a different model.
    """
    target = cache_folder() / "models" / f"{_safe_name(gguf)}-{_key(gguf)}"
    earlier = earlier_cache_folder()
    for folder in (target, *([] if earlier is None else [earlier / "models" / target.name])):
        if folder.is_dir():
            return folder
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, on_convert) as alone:
            if not target.is_dir():
                on_convert(f"Converting {gguf.name} to safetensors (once)")
                if alone:
                    _remove_stale(target)
                _convert_into(gguf, target, on_convert)
    except OSError as error:
        raise CacheFolderError(
            f"cannot write the converted model to {target.parent}: {error}. "
            "Free some space there, or set SPECACHE_CACHE to another folder."
        ) from error
    return target


def _convert_into(gguf: Path, target: Path, on_note: Callable[[str], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(target), dir=target.parent))
    try:
        write_safetensors(gguf, temporary, on_note)
        temporary.chmod(0o755)  # mkdtemp's 0o700 would hide a cache shared between users
        _rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_safetensors(gguf: Path, folder: Path, on_note: Callable[[str], None]) -> None:
    """Read `gguf`, dequantise its weights, and save model and tokenizer to `folder` in bfloat16."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf.parent), gguf.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name, local_files_only=True)
        with _without_progress_bar():
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused by name, below
            )
    except Exception as error:  # the readers raise any exception on malformed bytes
        raise ConversionError(f"cannot read {gguf} as a GGUF model: {_first_line(error)}") from error
    check_loaded(model, report, gguf.name, on_note)
    reader = GGUFReader(str(gguf), "r")
    apply_settings(model.config, reader)
    correct_tokenizer(tokenizer, reader, on_note)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Disable the bar of transformers' GGUF reader, which its own switch does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    original = getattr(reader, "tqdm", None)
    if original is None:
        yield
        return
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = original


def _rename(temporary: Path, target: Path) -> None:
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first; its copy is as good as ours
            raise


def _key(gguf: Path) -> str:
    """Return a digest of file content and converter version."""
    import transformers

    try:
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise ConversionError(f"cannot read {gguf}: {error.strerror or error}") from error
    digest.update(f"|{CONVERSION_VERSION}|{transformers.__version__}".encode())
    return digest.hexdigest()[:16]


def _safe_name(gguf: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", gguf.stem)[:80]


def _temporary_prefix(target: Path) -> str:
    return f".{target.name}.tmp-"


def _remove_stale(target: Path) -> None:
    """Remove what interrupted conversions left.

    Only under the lock, since another process may be converting.
    """
    for folder in target.parent.glob(f"{_temporary_prefix(target)}*"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(target: Path, on_wait: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock of one converted model, and yield True if it is held.

    Not every folder has locks.
    """
    from filelock import FileLock, Timeout  # here, since the command line starts faster without

    lock = FileLock(target.parent / f".{target.name}.lock", fallback_to_soft=False)  # a soft one would outlive a kill
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        on_wait("Waiting for another process that is converting the same model")
        held = lock.acquire()
    except OSError:
        yield False
        return
    with held:
        yield True


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
