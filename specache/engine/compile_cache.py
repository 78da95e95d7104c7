"""The compiled code of models on disk, so that a second process need not compile again.

`compiled/<machine>/<model>/` in the cache folder has what PyTorch's compiler wrote (`inductor/`),
and `manifest.json`: which steps are in it, and the digest of every file. The machine is the
processor with its features, and the versions of PyTorch, transformers and specache, because a home
folder may be shared by two machines. Files that differ from their digests are deleted, and compiled
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from specache.engine.compiled_layers import Variant
from specache.errors import ConfigError
from specache.platform import machine, private_torch
from specache.platform.folders import cache_folder

MANIFEST = "manifest.json"
_LOCK = "lock"
_UNSTABLE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # settings that the step does not depend on


class CompileCache:
    """The folder of one model on this machine, for its weights' shapes and number of threads.

    Args:
        folder: it, which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, described: str) -> CompileCache | None:
        """Return the folder of a model by `described_digest`, or `None` without a cache folder."""
        try:
            return cls(machine_folder() / described)
        except ConfigError:
            return None

    def variants(self) -> set[str]:
        """Return the names of the variants that can be loaded. Delete damaged files."""
        manifest = self._manifest()
        if manifest is None:
            return set()
        files = manifest["files"]
        if all(_file_digest(self._code / name) == digest for name, digest in files.items()):
            return set(manifest["variants"])
        with self.locked() as held:
            if held:
                shutil.rmtree(self._code, ignore_errors=True)
                (self.folder / MANIFEST).unlink(missing_ok=True)
        return set()

    def failure(self) -> str | None:
        """Return why this model could not be compiled in the background, or `None`."""
        manifest = self._manifest()
        return None if manifest is None else manifest["failure"]

    def record(self, variants: Iterable[Variant]) -> None:
        """Note that these variants were compiled, and the digests of all files."""
        names = sorted({*self.variants(), *(variant.name for variant in variants)})
        files = {
            str(path.relative_to(self._code)): _file_digest(path)
            for path in sorted(self._code.rglob("*"))
            if path.is_file() and path.suffix != ".lock"
        }
        self._write({"variants": names, "files": files, "failure": None})

    def record_failure(self, reason: str) -> None:
        """Note why no further variants can be compiled. Those that are there stay."""
        self._write((self._manifest() or {"variants": [], "files": {}}) | {"failure": reason})

    @contextmanager
    def used(self) -> Iterator[None]:
        """Have PyTorch's compiler read and write this folder inside the block.

        A folder that cannot be written is not used.
        """
        try:
            self._code.mkdir(parents=True, exist_ok=True)
        except OSError:
            yield
            return
        with private_torch.compiler_folder(str(self._code)):
            yield

    @contextmanager
    def locked(self) -> Iterator[int | None]:
        """Yield a descriptor that locks the folder, or `None` if another process has it locked.

        A child process that inherits the descriptor keeps the lock until it ends.
        """
        import fcntl

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            yield None
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield None
                return
            yield descriptor
        finally:
            os.close(descriptor)

    @property
    def _code(self) -> Path:
        return self.folder / "inductor"

    def _manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text())
            names, files, failure = manifest["variants"], manifest["files"], manifest["failure"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        valid = isinstance(names, list) and isinstance(files, dict) and isinstance(failure, str | None)
        return manifest if valid else None

    def _write(self, manifest: dict[str, Any]) -> None:
        temporary = self.folder / f"{MANIFEST}.{os.getpid()}"
        with suppress(OSError):
            temporary.write_text(json.dumps(manifest))
            temporary.replace(self.folder / MANIFEST)


def machine_folder() -> Path:
    """Return the folder of this machine's compiled code.

    Raises:
        ConfigError: there is no cache folder.
    """
    import specache

    processor = machine.processor()
    versions = [torch.__version__, transformers.__version__, specache.__version__, sys.version, os.environ.get("CXX")]
    features = sorted((processor.get("flags") or processor.get("Features") or "").split())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return cache_folder() / "compiled" / _digest([machine.processor_name(), features, gpu, versions])


def summary() -> dict[str, Any]:
    """Return how many models have compiled code for this machine, its bytes, and the failures."""
    try:
        folders = [path.parent for path in machine_folder().glob(f"*/{MANIFEST}")]
    except ConfigError:
        folders = []
    failures = [failure for folder in folders if (failure := CompileCache(folder).failure())]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    return {"models": len(folders) - len(failures), "used_bytes": size, "failures": failures}


def described_digest(model: Any) -> str:
    """Return a digest of what a model's compiled code depends on: all but the weights' values."""
    config = {
        name: value for name, value in model.config.to_dict().items() if name not in _UNSTABLE and not name.startswith("_attn")
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return _digest(
        [
            json.dumps(config, sort_keys=True, default=lambda value: type(value).__name__),
            [(name, f"{type(module).__module__}.{type(module).__qualname__}") for name, module in model.named_modules()],
            [(name, list(tensor.shape), str(tensor.dtype), str(tensor.device)) for name, tensor in tensors],
            torch.get_num_threads(),
        ]
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _file_digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
