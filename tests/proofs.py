"""Proofs that take minutes, of code that seldom changes.

A proof is a run that passed, on the files that it is about. Its digest stands in `tests/proofs/`:
while the files are the same, an ordinary run does not repeat it. `-m thorough` always does, and
writes the digest, which is committed with the change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).with_suffix("")
CODE = {".py", ".cpp", ".hpp", ".txt"}


class Proof:
    """One run, named `name`, of everything in `paths` (files or folders below the project's root).

    Other versions of `packages` make it another run too.
    """

    def __init__(self, name: str, paths: Iterable[str], packages: Iterable[str] = (), root: Path = ROOT, folder: Path = FOLDER):
        self.file = folder / name
        self._root, self._paths, self._packages = root, sorted(paths), sorted(packages)

    def digest(self) -> str:
        """Return a digest of the files' names and content, and of the packages' versions."""
        found = hashlib.blake2b(digest_size=16)
        for path in self._files():
            content = path.read_bytes()
            found.update(f"{path.relative_to(self._root).as_posix()} {len(content)}\n".encode() + content)
        for package in self._packages:
            found.update(f"{package} {_version(package)}\n".encode())
        return found.hexdigest()

    def is_known(self) -> bool:
        """Whether the run has passed on these very files."""
        return self.file.exists() and self.file.read_text().strip() == self.digest()

    def skip_if_known(self) -> None:
        if self.is_known():
            pytest.skip(f"nothing of it has changed since it passed (tests/proofs/{self.file.name}); -m thorough repeats it")

    def write(self) -> None:
        """Note that the run passed."""
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(self.digest() + "\n")

    def _files(self) -> list[Path]:
        files: list[Path] = []
        for path in self._paths:
            start = self._root / path
            if not start.exists():
                raise FileNotFoundError(f"{start}: a proof is about files that exist")
            files += [start] if start.is_file() else [file for file in start.rglob("*") if file.suffix in CODE]
        return sorted(set(files))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
