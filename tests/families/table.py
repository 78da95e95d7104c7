"""The families table: its data (`results.json`, one recorded run) and its page."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.families.compare import NEW, PROMPT, SETTINGS, TOLERANCE, Outcome

DATA = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COMMAND = ".venv/bin/python -m tests.families --write"
INTRODUCTION = """# Models

Every causal-LM family of transformers {version}, and every vision-language family, with text alone, as
a tiny seeded model: the family's own configuration with small sizes and each kind of layer that it
has (without the window if every layer slides by default). Settings: a prompt of {prompt} tokens in
chunks of 40, {new} greedy tokens, `top_k` at least the context, fp32. *equal*: under each of
{settings}, the tokens are those of the model's stock `generate()` and the
logits differ by less than {tolerance}. *refused*: an `UnsupportedModelError` with the reason, before an
answer. *not tried*: transformers itself does not build or run such a tiny model here, so there is
nothing to compare with. Wrong answers and other errors have no row, because a test fails on them.

{totals}

Made by `{command}`; `tests/engine/test_families.py` runs it again:
one family per attention code with every test run, all of them with `make test ARGS='-m families'`.

## What is refused, and why

- **Latent attention** (DeepSeek, GLM-5, Kimi, MiniCPM3): the cached states are already compressed,
  and are not keys and values per head.
- **State-space, linear, convolutional or chunked layers** (Mamba, Jamba, Qwen3-Next, LFM2, Llama
  4): their state is not a growing list of keys and values.
- **Every layer slides** (Mistral 7B v0.1): the cache does not grow, so there is nothing to compress.
- **Keys and values of different sizes** (MiMo-V2-Flash), layers that share them (Gemma 3n), layers
  that attend twice (DiffLlama, HRM).
- **Attention modules of their own** (BLOOM, MPT, Falcon, GPT-J, StableLM, ...): they do not use
  transformers' attention interface. They are refused so that ALiBi, relative positions and the like
  are not silently ignored.
- **Biases, masks, sparse selections, dropout** that a model passes to its attention and that
  specache's would ignore are refused by the name of the argument, also for model classes from
  outside of transformers. A mask that a model makes itself is checked: it is accepted if it is
  causal, or causal within the layer's window, as specache's attention is.
- **Attention or mask functions that a user registered** (`AttentionInterface`, `AttentionMaskInterface`, or a replaced
  `eager_attention_forward`): specache's attention takes the place of the one that the model has set, and what such a
  function adds would be ignored.
- **Encoder-decoders and encoders.**

## How long a sequence may be

`max_position_embeddings`, or RoPE's factor times the original positions where that is more (yarn,
linear, llama3, longrope; per kind of layer; also the old `rope_scaling`). Longer prompts are
refused. New tokens may go past this length, as in stock `generate()`. Dynamic NTK scaling has no
such length. A model with a table of positions (GPT-2, OPT, BERT) cannot go past the end of the
table: a text that does raises `UsageError`, with the tokens generated so far in `new_token_ids`;
stock `generate()` raises an index error.
"""


def write(outcomes: list[Outcome], vision: list[Outcome], version: str, replace: bool = False) -> None:
    """Record a run and write the page; `replace` keeps the rows of families that did not run."""
    data = {"transformers": version, "causal": [asdict(o) for o in outcomes], "vision": [asdict(o) for o in vision]}
    if replace:
        before = recorded()
        data |= {kind: _merged(before[kind], data[kind]) for kind in NAMES}
    DATA.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(data))


def _merged(before: list[dict[str, str]], rows: list[dict[str, str]]) -> list[dict[str, str]]:
    new = {(row["model_type"], row["model_class"]): row for row in rows}
    return [new.get((row["model_type"], row["model_class"]), row) for row in before]


def recorded() -> dict[str, Any]:
    """Return the recorded run: `transformers` (version), `causal` and `vision` (outcomes)."""
    data: dict[str, Any] = json.loads(DATA.read_text())
    return data


def page(data: dict[str, Any]) -> str:
    """Return docs/models.md for a recorded run."""
    totals = "\n".join(f"- {name}: {_totals(data[kind])}" for kind, name in NAMES.items())
    settings = ", ".join(f"`{name}`" for name in SETTINGS)
    parts = [
        INTRODUCTION.format(
            version=data["transformers"],
            prompt=PROMPT,
            new=NEW,
            settings=settings,
            tolerance=TOLERANCE,
            totals=totals,
            command=COMMAND,
        )
    ]
    for kind, name in NAMES.items():
        rows = [f"| {row['model_type']} | {row['model_class']} | {_result(row)} |" for row in data[kind]]
        parts.append("\n".join([f"## {name}", "", "| family | class | result |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


NAMES = {"causal": "Causal language models", "vision": "Vision-language models, with text alone"}


def _totals(rows: list[dict[str, str]]) -> str:
    counts = Counter(row["result"] for row in rows)
    parts = [f"{counts[result]} {result}" for result in ("equal", "refused", "not tried", "wrong", "error") if counts[result]]
    return f"{len(rows)} families, of which " + ", ".join(parts)


def _result(row: dict[str, str]) -> str:
    reason = row["reason"].replace("|", "\\|").replace(row["model_class"], "it")
    return row["result"] if not reason else f"{row['result']}: {reason}"
