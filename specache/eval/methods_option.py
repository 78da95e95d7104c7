"""Parse `--methods full,specache:bits=1:policy=speculative,kivi:bits=1`, and label the methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specache.config import SpeCacheConfig
from specache.errors import ConfigError
from specache.eval import catalogue
from specache.eval.methods.base import Method
from specache.eval.methods.specache import SpeCacheMethod
from specache.eval.setting_fields import field_types, flag, parse, shown

ALIASES = {"k": "top_k", "g": "group_size", "r": "residual", "b": "bits"}
_FIXED = ("slow_tier", "slow_dir", "fast_memory")  # the shared prefill decides these fields of SpeCacheConfig


@dataclass(frozen=True)
class NamedMethod:
    """A method and its label in a run.

    Attributes:
        label: the method's name and the settings that differ from its defaults: `specache bits=1
            policy=speculative`.
    """

    label: str
    method: Method

    @property
    def name(self) -> str:
        """Return the method's name in the catalogue."""
        return self.method.name

    @property
    def settings(self) -> dict[str, Any]:
        """Return all settings, JSON-ready."""
        return self.method.settings()


def parse_methods(text: str) -> list[NamedMethod]:
    """Return the methods of a `--methods` value, in order.

    Raises:
        ConfigError: an unknown method or setting, a bad value, a duplicate, or no method at all.
    """
    methods = [parse_method(entry) for entry in split_methods(text)]
    check_unique(methods)
    return methods


def split_methods(text: str) -> list[str]:
    """Return the entries of a `--methods` value. Raise `ConfigError` if there is none."""
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise ConfigError(f"--methods needs at least one method. Known: {', '.join(catalogue.METHODS)}.")
    return entries


def parse_method(text: str) -> NamedMethod:
    """Parse one method: `name` or `name:setting=value:setting=value`."""
    return named(*read_method(text))


def read_method(text: str) -> tuple[Any, dict[str, Any]]:
    """Return the class of one method and the settings that were given, as values."""
    name, *assignments = (part.strip() for part in text.split(":"))
    cls = catalogue.method_class(name)
    kinds = setting_types(cls)
    settings: dict[str, Any] = {}
    for assignment in assignments:
        field, value = _assignment(name, assignment, kinds)
        if field in settings:
            raise ConfigError(f"the method {name!r} has {field} twice.")
        settings[field] = parse(value, kinds[field], f"{name}:{field}")
    return cls, settings


def named(cls: Any, settings: dict[str, Any]) -> NamedMethod:
    """Make a method with its label. Raise `ConfigError` if its settings are refused."""
    try:
        method = cls.with_settings(settings) if hasattr(cls, "with_settings") else cls(**settings)
    except ConfigError as error:
        raise ConfigError(f"the method {cls.name!r}: {error}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the method {cls.name!r} cannot be made with {settings}: {error}") from error
    return NamedMethod(_label(cls, method), method)


def check_unique(methods: list[NamedMethod]) -> None:
    """Raise `ConfigError` if two methods are equal, however they were written."""
    seen: set[str] = set()
    for method in methods:
        if method.label in seen:
            raise ConfigError(f"--methods names the same method twice: {method.label!r} (settings that are defaults do not count).")
        seen.add(method.label)


def setting_types(cls: Any) -> dict[str, Any]:
    """Return the settings of a method: field -> type."""
    if cls is SpeCacheMethod:
        return {name: kind for name, kind in field_types(SpeCacheConfig).items() if name not in _FIXED}
    return field_types(cls)


def resolve_field(name: str, field: str, kinds: dict[str, Any]) -> str:
    """Return the field of a setting that a user may have written with dashes, or as an alias.

    Raises:
        ConfigError: there is no such setting. The message lists those that exist.
    """
    field = field.strip().replace("-", "_")
    if field not in kinds and ALIASES.get(field) in kinds:
        field = ALIASES[field]
    if field not in kinds:
        known = f"It has: {', '.join(kinds)}." if kinds else "It has none."
        raise ConfigError(f"the method {name!r} has no setting {field!r}. {known}")
    return field


def _assignment(name: str, text: str, kinds: dict[str, Any]) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not equals or not value.strip():
        raise ConfigError(f"{text!r} in --methods: write a setting as field=value, for example {_example(name, kinds)}.")
    return resolve_field(name, field, kinds), value


def _example(name: str, kinds: dict[str, Any]) -> str:
    return f"{name}:{flag(next(iter(kinds)))}=..." if kinds else "specache:bits=1"


def _label(cls: Any, method: Method) -> str:
    settings = method.settings()
    try:
        defaults = method.defaults()
    except TypeError:  # a setting without default
        defaults = {}
    differing = [key for key, value in sorted(settings.items()) if key not in defaults or defaults[key] != value]
    return " ".join([cls.name, *(f"{key}={shown(settings[key])}" for key in differing)])
