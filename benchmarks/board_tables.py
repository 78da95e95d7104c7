"""The tables of the results board: Markdown from summaries, one function per kind of question."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

NONE_YET = "No result file yet: `make results` (or `ONLY=NAME`) measures the runs of `benchmarks/runs.toml`.\n"
NOTHING = "-"
FULL, OURS = "full", "specache"
_ALWAYS_SHOWN = ("bits", "residual", "top_k")
_BENCH_COLUMNS = ("impl", "isa", "cache", "weights", "bits", "top_k", "rows", "batch", "context", "ms", "ms_per_step")
_RATIOS = {"vs_sdpa_bf16": "against sdpa bf16", "vs_best_matmul": "against matmul", "vs_dynamic": "against DynamicCache"}


@dataclass(frozen=True)
class Result:
    """One result file.

    Attributes:
        name: of the file, without its suffix.
        model: as the board calls it.
        document: the summary (see `specache/eval/run_summary.py`).
    """

    name: str
    model: str
    document: dict[str, Any]

    @property
    def setting(self) -> str:
        """Return the model with its number formats, where they are not the default."""
        formats = [self.document.get("dtype"), self.document.get("weights")]
        return ", ".join([self.model, *(one for one in formats if one and one != "float32")])

    @property
    def link(self) -> str:
        """Return a link to the file."""
        return f"[{self.name}](results/{self.name}.json)"

    @property
    def longest(self) -> int:
        """Return the longest prompt, in tokens; 0 if unknown."""
        rows = [*self.document.get("rows", []), *self.document.get("overall", [])]
        return max((count for row in rows for count in row.get("prompt_tokens", [])), default=0)

    def method(self, label: str, longest: int | None = None) -> str:
        """Return a method as the tables call it.

        Of ours it has bits, `R` and `k` even where they were the defaults, since defaults change.

        Args:
            longest: tokens of the longest prompt. None is that of the file.
        """
        longest = self.longest if longest is None else longest
        name, *settings = label.split()
        used = self.document["methods"][label]["settings"]
        if name == OURS:
            given = {setting.partition("=")[0] for setting in settings}
            settings += [f"{key}={used[key]}" for key in _ALWAYS_SHOWN if key in used and key not in given]
            if longest >= used.get("long_from", math.inf) and used["long_top_k"] != used["top_k"] and "long_top_k" not in given:
                settings.append(f"long_top_k={used['long_top_k']}")
        return " ".join([f"`{name}`", *settings])

    def rows(self, kind: str, group: str | None = None) -> list[Row]:
        """Return the rows of a list of the summary, of one group of items."""
        return [row for row in self.document[kind] if group is None or row["task"] == group]


def fidelity(results: list[Result]) -> str:
    """Return the divergence of every method, along texts and along answers."""
    head = ["model", "tokens", "method", "KL, text (95%)", "p99", "KL, answer (95%)", "p99", "fast", "hot set", "documents"]
    lines = []
    divergences = [result for result in results if result.document["unit"].startswith("KL")]
    for result in divergences:
        by_method: dict[str, dict[str, Row]] = {}
        for row in result.rows("rows"):
            by_method.setdefault(row["method"], {})[row["task"].rpartition("/")[2]] = row
        for method, rows in by_method.items():
            row = next(iter(rows.values()))
            divergence = [text for along in ("text", "answer") for text in _mean_and_tail(rows.get(along))]
            sizes = [_times(row["fast_ratio"]), _times(row.get("hot_ratio")), str(row["n"])]
            lines.append(
                [result.setting, _tokens(rows.values()), result.method(method), *divergence, *sizes, *_source(result, row)]
            )
    others = scores([result for result in results if result not in divergences])
    return _join(_table([*head, "commit", "run"], lines), _commands(divergences), others)


def memory(results: list[Result]) -> str:
    """Return what the default holds in fast memory, and its divergence, document by document."""
    head = ["model", "tokens", "method", "fast", "hot set", "together", "KL, text", "KL, answer", "commit", "run"]
    lines = []
    for result in results:
        by_length: dict[int, dict[str, Row]] = {}
        for row in result.rows("lengths"):
            if row["method"] == OURS:
                by_length.setdefault(_rounded_tokens(row["prompt_tokens"]), {})[row["task"].rpartition("/")[2]] = row
        for tokens, rows in sorted(by_length.items()):
            row = next(iter(rows.values()))
            fast, hot = row["fast_ratio"], row["hot_ratio"]
            sizes = [_times(fast), _times(hot), _times(fast + hot)]
            means = [_number(rows[along]["mean"]) if along in rows else NOTHING for along in ("text", "answer")]
            lines.append([result.setting, f"{tokens:,}", result.method(OURS, tokens), *sizes, *means, *_source(result, row)])
    return _table(head, lines)


def scores(results: list[Result]) -> str:
    """Return the scores and what is kept, per run and method, and over all runs together.

    Groups in which `specache` is below the full cache by more than the interval come first.
    """
    head = ["model", "tokens", "task", "method", "items", "mean", "against full (95%)", "kept (95%)", "of", "fast", "hot set"]
    lines = []
    for result in results:
        unit = result.document["unit"]
        task = result.document["task"] if unit == "score" else f"{result.document['task']} ({unit})"
        for row in result.rows("overall"):
            figures = [str(row["n"]), _number(row["mean"]), _signed(row), _share(row), str(row.get("kept_n", NOTHING))]
            sizes = [_times(row["fast_ratio"]), _times(row.get("hot_ratio"))]
            lines.append(
                [result.setting, _tokens([row]), task, result.method(row["method"]), *figures, *sizes, *_source(result, row)]
            )
    return _join(_below_full(results), _table([*head, "commit", "run"], lines), _together(results), _commands(results))


def variants(results: list[Result]) -> str:
    """Return the simulated variants of the code, one line each, with the models side by side."""
    names = list(dict.fromkeys(row["variant"] for result in results for row in result.document["variants"]))
    head = ["variant"]
    for result in results:
        head += [f"{result.model}: KL", "p99", "memory", "pairs"]
    lines = []
    for name in names:
        line = [name]
        for result in results:
            row = next((row for row in result.document["variants"] if row["variant"] == name), None)
            line += (
                [NOTHING] * 4
                if row is None
                else [_number(row["mean"]), _number(row["p99"]), _times(row["memory"]), f"{row['pairs']:.0f}"]
            )
        lines.append(line)
    return _join(_table(head, lines), _commands(results))


def speed(results: list[Result]) -> str:
    """Return milliseconds per step or layer. Each run has a table: its rows alone compare."""
    parts = []
    for result in results:
        document = result.document
        rows = [row for row in document["results"] if not row.get("skipped")]
        columns = [name for name in _BENCH_COLUMNS if any(row.get(name) not in (None, "") for row in rows)]
        ratios = [name for name in _RATIOS if any(row.get(name) is not None for row in rows)]
        head = [*(name.replace("_", " ") for name in columns), *(_RATIOS[name] for name in ratios)]
        lines = [
            [*(_figure(row.get(name)) for name in columns), *(_ratio(row.get(name)) for name in ratios)]
            for row in sorted(rows, key=lambda row: not str(row["impl"]).startswith(OURS))
        ]
        origin = document["origins"][0]
        parts += [f"{result.model}, {result.link}, commit {origin['commit']}:\n", _table(head, lines)]
    return _join(*parts, _commands(results))


def _below_full(results: list[Result]) -> str:
    found = []
    for result in results:
        sign = 1 if result.document["unit"] == "score" else -1
        for row in result.rows("rows"):
            bounds = [sign * bound for bound in row.get("delta_ci95") or [0.0]]
            if row["method"].split()[0] == OURS and max(bounds) < 0:
                found.append(f"- {result.setting}, {row['task']}, {result.method(row['method'])}: {_signed(row)} ({result.link})")
    if not found:
        return ""
    return "**Worse than the full cache by more than the interval:**\n\n" + "\n".join(found) + "\n"


def _together(results: list[Result]) -> str:
    """Return what each method keeps over all runs that measured it, where there are several.

    Of runs that differ in the number of documents alone, the first of which are the same, the one
    with the most answers counts.
    """
    by_method: dict[str, dict[str, Row]] = {}
    for result in results:
        told = result.document
        settings = {name: value for name, value in told["settings"].items() if name != "documents"}
        measured = json.dumps([told["task"], told["model"], told["dtype"], told["seed"], settings], sort_keys=True)
        for row in result.rows("overall"):
            if row.get("kept_n") and row["method"] != FULL:
                rows = by_method.setdefault(result.method(row["method"]), {})
                rows[measured] = max(row, rows.get(measured, row), key=lambda row: row["kept_n"])
    lines = []
    for method, found in by_method.items():
        rows = list(found.values())
        if len(rows) > 1:
            share, low, high = pooled(rows)
            total = sum(row["kept_n"] for row in rows)
            lines.append([method, str(len(rows)), f"{share:.1%} ({low:.1%} to {high:.1%})", f"{total:,}"])
    return _table(["all runs together", "runs", "kept (95%)", "of"], lines)


def pooled(rows: list[Row]) -> tuple[float, float, float]:
    """Return the share kept over independent runs, weighted by what was right, and its interval.

    Each side of the interval is the root of the runs' weighted squared sides (MOVER, Zou and Donner
    2008), so that it holds whatever the intervals of the runs are.
    """
    total = sum(row["kept_n"] for row in rows)
    weights = [row["kept_n"] / total for row in rows]
    share = sum(round(row["kept"] * row["kept_n"]) for row in rows) / total
    sides = [
        math.sqrt(sum((weight * (row["kept_ci95"][side] - row["kept"])) ** 2 for weight, row in zip(weights, rows, strict=True)))
        for side in (0, 1)
    ]
    return share, max(0.0, share - sides[0]), min(1.0, share + sides[1])


def _commands(results: list[Result]) -> str:
    if not results:
        return ""
    lines = []
    for result in results:
        for origin in result.document["origins"] or [{}]:
            facts = [origin.get("date"), origin.get("commit"), origin.get("machine"), _threads(origin), origin.get("kernels")]
            lines.append(f"# {result.name}: " + ", ".join(str(fact) for fact in facts if fact))
        lines.append(result.document["command"].replace("--out DIR", f"--out results/{result.name}"))
    return "```\n" + "\n".join(lines) + "\n```\n"


def _threads(origin: dict[str, Any]) -> str | None:
    count = origin.get("threads")
    return None if count is None else f"{count} thread{'s' * (count != 1)}"


def _source(result: Result, row: Row) -> list[str]:
    return [row["commit"], result.link]


def _tokens(rows: Iterable[Row]) -> str:
    """Return the shortest and the longest prompt."""
    counts = [_rounded_tokens(count) for row in rows for count in row.get("prompt_tokens", [])]
    if not counts:
        return NOTHING
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def _rounded_tokens(count: int) -> int:
    return round(count, -2) if count >= 1000 else count  # a question and a template make 4,000 tokens 4,036


def _mean_and_tail(row: Row | None) -> list[str]:
    if row is None:
        return [NOTHING, NOTHING]
    return [_interval(row, "mean", "ci95"), _number(row.get("p99"))]


def _interval(row: Row, value: str, interval: str) -> str:
    low, high = row[interval]
    return f"{_number(row[value])} ({_number(low)} to {_number(high)})" if row[value] else "0"


def _signed(row: Row) -> str:
    if row.get("delta") is None:
        return NOTHING
    low, high = row["delta_ci95"]
    return f"{row['delta']:+.3f} ({low:+.3f} to {high:+.3f})"


def _share(row: Row) -> str:
    if row.get("kept") is None:
        return NOTHING
    low, high = row["kept_ci95"]
    return f"{row['kept']:.1%} ({low:.1%} to {high:.1%})"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2g}"


def _times(ratio: float | None) -> str:
    return f"{ratio:.3f}x" if ratio else NOTHING


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return NOTHING if value in (None, "") else f"{value:,}" if isinstance(value, int) else str(value)


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2g}x" if value < 10 else f"{value:.0f}x"


def _table(head: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return ""
    rule = ["---"] * len(head)
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in (head, rule, *lines))


def _join(*parts: str) -> str:
    return "\n".join(part for part in parts if part)
