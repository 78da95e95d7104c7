"""Read devices from TOML: the package's table, and a `--gpu-spec` file."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from specache.errors import ConfigError
from specache.planning.roofline.device_figures import FIGURES, Device, Efficiency
from specache.platform.text_files import decode_text

TABLE = Path(__file__).with_name("devices.toml")
KINDS = ("gpu", "cpu")
_WRITTEN = tuple(one.name for one in fields(Device) if one.name != "key")
_REQUIRED = tuple(
    one.name for one in fields(Device) if one.default is MISSING and one.default_factory is MISSING and one.name != "key"
)
_SHARES = tuple(one.name for one in fields(Efficiency))


@cache
def known_devices() -> dict[str, Device]:
    """Return the devices of the package's table, by name."""
    return {key: _device(key, values, f"{TABLE.name}: {key}") for key, values in _read(TABLE).items()}


def device_named(key: str) -> Device:
    """Return a device of the table.

    Raises:
        ConfigError: the table has no device of this name.
    """
    if key not in known_devices():
        raise ConfigError(
            f"--gpu must be cpu or one of {', '.join(known_devices())}, got {key!r}. Describe another one with --gpu-spec FILE."
        )
    return known_devices()[key]


def device_from_file(path: Path) -> Device:
    """Return the device that a `--gpu-spec` file describes.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or a key is missing, unknown or out of
            range.
    """
    return _device(path.name, _read(path), f"--gpu-spec {path}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(decode_text(path.read_bytes(), f"--gpu-spec {path} is no TOML: the file", ConfigError))
    except OSError as error:
        raise ConfigError(f"--gpu-spec {path} cannot be read: {error.strerror or error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--gpu-spec {path} is no TOML: {error}.") from error


def _device(key: str, values: Mapping[str, Any], where: str) -> Device:
    _check_keys(values, _WRITTEN, where)
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}. Every device has {', '.join(_REQUIRED)}.")
    for name in FIGURES:
        if name in values and not _positive(values[name]):
            raise ConfigError(f"{where}: {name} must be a number above 0, got {values[name]!r}.")
    for name in ("name", "link", "source"):
        if not isinstance(values.get(name, ""), str):
            raise ConfigError(f"{where}: {name} must be text, got {values[name]!r}.")
    if values.get("kind", KINDS[0]) not in KINDS:
        raise ConfigError(f"{where}: kind must be one of {', '.join(KINDS)}, got {values['kind']!r}.")
    given = {"source": f"not said in {key}", **values}
    return Device(**{**given, "key": key, "sources": _sources(values, where), "efficiency": _efficiency(values, where)})


def _sources(values: Mapping[str, Any], where: str) -> dict[str, str]:
    sources = values.get("sources", {})
    _check_table(sources, "sources", where)
    _check_keys(sources, FIGURES, f"{where}, [sources]")
    for name, source in sources.items():
        if not isinstance(source, str):
            raise ConfigError(f"{where}: sources.{name} must be text, got {source!r}.")
    return dict(sources)


def _efficiency(values: Mapping[str, Any], where: str) -> Efficiency:
    shares = values.get("efficiency", {})
    _check_table(shares, "efficiency", where)
    _check_keys(shares, _SHARES, f"{where}, [efficiency]")
    for name, share in shares.items():
        if not _positive(share) or share > 1:
            raise ConfigError(f"{where}: efficiency.{name} must be a share above 0 and up to 1, got {share!r}.")
    return Efficiency(**shares)


def _check_table(value: Any, name: str, where: str) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {name} must be a table [{name}], got {value!r}.")


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{where} has no key {', '.join(unknown)}. There are {', '.join(known)}.")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
