"""`ablate`: sweep one setting of a method over any task (paper Figure 5: `k` from 0 to 256)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from specache.errors import ConfigError
from specache.eval import catalogue
from specache.eval.methods.base import Session
from specache.eval.methods_option import NamedMethod, named, read_method, resolve_field, setting_types, split_methods
from specache.eval.plots import FULL_COLOUR, SMALLEST, common_legend, margins, mean_label, new_figure, style, tidy
from specache.eval.prefilled import Prefilled
from specache.eval.results import Cell
from specache.eval.setting_fields import from_json, parse, shown
from specache.eval.table_rows import Row
from specache.eval.tasks.base import Item, Measurement, Prepared, Task, TaskModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_STYLES = ("--", "-.", (0, (6, 2, 1, 2, 1, 2)))  # lines of methods without the field
_Curve = dict[Any, Row]  # value of the swept field -> row


@dataclass(frozen=True)
class Ablate:
    """Another task, measured for several values of one setting."""

    name: ClassVar[str] = "ablate"
    summary: ClassVar[str] = "sweep one setting of a method over any task, and plot it (paper Figure 5)"
    task: Task
    field: str

    @property
    def unit(self) -> str:
        """Return the other task's unit."""
        return self.task.unit

    def settings(self) -> dict[str, Any]:
        return {"field": self.field, "task": self.task.name, "options": self.task.settings()}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Ablate:
        """Restore the task from the values of `settings`."""
        return cls(from_json(catalogue.task_class(settings["task"]), settings["options"]), settings["field"])

    def items(self, model: TaskModel) -> Iterator[Item]:
        return self.task.items(model)

    def prepare(self, model: TaskModel, item: Item, prompt: Prefilled) -> Prepared:
        return self.task.prepare(model, item, prompt)

    def measure(self, model: TaskModel, prepared: Prepared, session: Session) -> Measurement:
        return self.task.measure(model, prepared, session)

    def figures(self, rows: list[Row], cells: list[Cell]) -> dict[str, Figure]:
        """Plot the mean and, for distributions, the 99th percentile against the field's value.

        Each method has one curve.
        """
        return {"ablation": self._figure(rows)} if rows else {}

    def _figure(self, rows: list[Row]) -> Figure:
        groups = list(dict.fromkeys(row["task"] for row in rows))
        across = min(3, len(groups))
        down = math.ceil(len(groups) / across)
        figure = new_figure(max(6.4, 4.6 * across), 3.4 * down + 1.2)
        panels = list(zip(groups, figure.subplots(down, across, squeeze=False).reshape(-1), strict=False))
        for group, axes in panels:
            self._panel(axes, [row for row in rows if row["task"] == group])
            axes.set_title(group)
            tidy(axes)
        for unused in figure.axes[len(groups) :]:
            unused.set_visible(False)
        common_legend(figure, panels)
        return figure

    def _panel(self, axes: Axes, rows: list[Row]) -> None:
        curves, lines = _curves(rows, self.field)
        values = sorted({value for curve in curves.values() for value in curve}, key=_order)
        places = {value: place for place, value in enumerate(values)}
        logarithmic = not mean_label(rows).endswith("score")
        for number, (label, curve) in enumerate(curves.items()):
            _draw(axes, curve, places, label, number, logarithmic)
        for number, row in enumerate(lines):
            if row["mean"] is not None and (row["mean"] >= SMALLEST or not logarithmic):
                pattern = LINE_STYLES[number % len(LINE_STYLES)]
                axes.axhline(row["mean"], color=FULL_COLOUR, linewidth=1, linestyle=pattern, label=row["method"])
        axes.set_xticks(range(len(values)), [shown(value) for value in values])
        axes.set(xlabel=self.field, ylabel=mean_label(rows), yscale="log" if logarithmic else "linear")


def sweep(methods: str, field: str, values: str) -> list[NamedMethod]:
    """Return every method that has the field once per value, and the other methods unchanged.

    `top_k` 0, which no cache has, becomes policy `none`: the low-bit copy alone.

    Raises:
        ConfigError: no method has the field, a method already sets it, or a value does not fit.
    """
    texts = [text for text in values.split(",") if text.strip()]
    if not texts:
        raise ConfigError("--values needs at least one value, for example --values 0,16,32,64.")
    found: dict[str, NamedMethod] = {}
    swept = False
    for entry in split_methods(methods):
        cls, settings = read_method(entry)
        variants = [settings]
        if (name := _field_of(cls, field)) is not None:
            swept = True
            if name in settings:
                raise ConfigError(f"--methods {entry} sets {name}, which --field sweeps. Leave it out there.")
            variants = [_with_value(cls, settings, name, text) for text in texts]
        for variant in variants:
            method = named(cls, variant)
            found.setdefault(method.label, method)
    if not swept:
        known = ", ".join(setting_types(catalogue.method_class("specache")))
        raise ConfigError(f"none of --methods {methods} has a setting {field!r}. specache has: {known}.")
    return list(found.values())


def canonical_field(methods: str, field: str) -> str:
    """Return the field's name without dashes and aliases, as `sweep` resolves it."""
    names = (_field_of(read_method(entry)[0], field) for entry in split_methods(methods))
    return next(name for name in names if name is not None)


def _field_of(cls: Any, field: str) -> str | None:
    try:
        return resolve_field(cls.name, field, setting_types(cls))
    except ConfigError:
        return None


def _with_value(cls: Any, settings: dict[str, Any], field: str, text: str) -> dict[str, Any]:
    value = parse(text, setting_types(cls)[field], f"--values for {field}")
    if field == "top_k" and value == 0 and cls.name == "specache":
        return {**settings, "policy": "none"}
    return {**settings, field: value}


def _curves(rows: list[Row], field: str) -> tuple[dict[str, _Curve], list[Row]]:
    """Group the rows by what their methods name besides the field. Settings that are not named may
    follow it, as the residual follows the bits.

    Returns:
        Label -> value -> row, and the rows of methods without the field.
    """
    swept = {field, "long_top_k"} if field == "top_k" else {field}  # the latter follows a given `top_k`
    curves: dict[str, _Curve] = {}
    zeros: list[Row] = []
    lines: list[Row] = []
    for row in rows:
        config = row["config"]
        if field not in config:
            lines.append(row)
        elif field == "top_k" and config.get("policy") == "none":
            zeros.append(row)
        else:
            curves.setdefault(_without(row["method"], swept), {})[_plain(config[field])] = row
    for zero in zeros:  # `top_k` 0 starts every curve over the same low-bit copy
        copy = _without(zero["method"], {*swept, "policy"})
        beginnings = [curve for label, curve in curves.items() if _without(label, {"policy"}) == copy]
        for curve in beginnings:
            curve[0] = zero
        if not beginnings:
            lines.append(zero)
    return curves, lines


def _without(label: str, settings: set[str]) -> str:
    """Return a method's label without these settings."""
    return " ".join(part for part in label.split() if part.partition("=")[0] not in settings)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def _draw(axes: Axes, curve: _Curve, places: dict[Any, int], label: str, number: int, logarithmic: bool) -> None:
    method_style = style(number)
    points = [(places[value], curve[value]) for value in sorted(curve, key=_order) if curve[value]["mean"] is not None]
    below_above = [[bars[side][0] if (bars := margins(row)) else 0.0 for _, row in points] for side in (0, 1)]
    axes.errorbar(
        [place for place, _ in points],
        [row["mean"] for _, row in points],
        yerr=below_above,
        color=method_style.colour,
        marker=method_style.marker,
        linestyle=method_style.line,
        markersize=5,
        capsize=3,
        label=label,
    )
    if logarithmic and all(row["p99"] for _, row in points):
        places_and_tails = [place for place, _ in points], [row["p99"] for _, row in points]
        axes.plot(*places_and_tails, color=method_style.colour, linestyle=":", marker=".", label=f"{label}, 99th percentile")
