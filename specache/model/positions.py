"""Read the number of positions and the RoPE of a model from its configuration and modules.

RoPE stretched by a factor (yarn, linear, llama3, longrope, ...) extends a model beyond
`max_position_embeddings`, because model cards tell users to add the entry and leave the rest. A
learned table of positions has a fixed end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_POSITION_TABLE = re.compile(r"(^|_)(wpe|pos(ition)?s?_?emb\w*|embed_?pos\w*)$", re.IGNORECASE)
_OTHER_MODALITY = re.compile(r"vision|visual|image|img|patch|video|audio|speech|encoder|tower|qformer|perceiver", re.IGNORECASE)
_COUNTS_IDS = "create_position_ids_from_input_ids"
_ADDS_POSITIONS = re.compile(r"rotary|rope|pos(ition|_emb|_enc)|wpe", re.IGNORECASE)


def rope_entries(config: Any) -> list[dict[str, Any]]:
    """Return the RoPE parameters of a text configuration: one entry, or one per kind of layer.

    Return an empty result without RoPE.
    """
    for name in ("rope_parameters", "rope_scaling"):  # configurations outside of transformers still have the second
        parameters = getattr(config, name, None)
        if isinstance(parameters, dict) and parameters:
            return [entry for entry in parameters.values() if isinstance(entry, dict)] or [parameters]
    return []


def rope_type(entry: dict[str, Any]) -> str:
    """Return the type of an entry: `default`, `linear`, `dynamic`, `yarn`, `longrope`, ..."""
    kind = entry.get("rope_type") or entry.get("type") or "default"
    return "longrope" if kind == "su" else str(kind)  # its name in the first Phi-3


def rope_switch(config: Any) -> tuple[str, int | None]:
    """Return (RoPE type, length above which the frequencies change or None).

    It describes the entry that depends on the length, else the first.
    """
    entries = rope_entries(config)
    for entry in entries:
        kind = rope_type(entry)
        if kind == "dynamic":
            return kind, config.max_position_embeddings
        if kind == "longrope":
            original = entry.get("original_max_position_embeddings") or config.original_max_position_embeddings
            return kind, int(original)
    return (rope_type(entries[0]) if entries else "default"), None


def max_positions(model: Any) -> int | None:
    """Return the longest sequence, in tokens, that a transformers model was made for.

    Return None if unlimited.

    This is the larger of `max_position_embeddings` and the positions before stretching times RoPE's
    factor, because some configurations state the stretched length already. Dynamic NTK scaling, and
    models without positions, have no limit.
    """
    config = model.config.get_text_config(decoder=True)
    table = position_table(model)
    stated = getattr(config, "max_position_embeddings", None)
    if table is not None:
        return table if stated is None else min(table, stated)
    entries = rope_entries(config)
    if stated is None or any(rope_type(entry) == "dynamic" for entry in entries):
        return None
    if not entries and not _adds_positions(model):
        return None
    return max(stated, *(_stretched(entry, config, stated) for entry in entries)) if entries else stated


def computes_positions_itself(model: Any) -> bool:
    """Return True if a module computes positions from ids and ignores given ones (Kosmos-2.5).

    Such a module may start behind the padding index, so positions from 0 on would not be the
    model's.
    """
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None or not any(hasattr(module, _COUNTS_IDS) for module in model.modules()):
        return False
    given = torch.tensor([[0, 1]])
    arguments = {"attention_mask": torch.ones_like(given), "past_key_values": None, "use_cache": False, "is_first_iteration": True}
    try:
        prepared = prepare(torch.ones_like(given), position_ids=given, **arguments)
    except Exception:  # it needs inputs that only its own kind of prompt has
        return False
    return isinstance(prepared, dict) and prepared.get("position_ids") is None


def _stretched(entry: dict[str, Any], config: Any, stated: int) -> int:
    factor = entry.get("factor")
    if rope_type(entry) == "default" or not isinstance(factor, int | float) or factor <= 1:
        return stated
    original = entry.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or stated
    return int(factor * original)


def _adds_positions(model: Any) -> bool:
    """Return True if a module's name indicates positions.

    Models without (Jamba) or with ALiBi have no limit.
    """
    modules = getattr(model, "named_modules", None)
    if modules is None:
        return True
    return any(_ADDS_POSITIONS.search(f"{name.rpartition('.')[2]} {type(module).__name__}") for name, module in modules())


def position_table(model: Any) -> int | None:
    """Return the number of positions in the decoder's table (GPT-2, OPT); None without a table."""
    return min(_table_sizes(model), default=None)


def _table_sizes(model: Any) -> Iterator[int]:
    modules = getattr(model, "named_modules", None)
    for name, module in modules() if modules is not None else ():
        if _OTHER_MODALITY.search(name):
            continue
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name.rpartition(".")[2]):
            yield module.num_embeddings - int(getattr(module, "offset", 0))  # OPT's first rows are not positions
        elif isinstance(table := getattr(module, "pos_encoding", None), Tensor):  # CTRL
            yield table.shape[0]
