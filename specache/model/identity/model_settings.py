"""Select the part of a model's configuration that its keys and values depend on.

A field is selected by its name: sizes, RoPE, norms, activations, windows, caps, scales, routing.
Other fields are ignored: labels, token ids, dropout, how the model is run, and fields that a later
transformers adds. An absent field, None and False are equal, because a new field has one of these
values for older models. Weight samples (`tensors`) cover what names do not show.
"""

from __future__ import annotations

import re
from typing import Any

_RELEVANT = re.compile(
    r"""model_type | d_(model|head|inner|rel) | dim_(ff|head) | dff | .*hidden_size | .*intermediate_size | .*feed_forward_size
    | .*_dims? | .*head_size | .*embedding_size | .*_rank | kv_channels | swa_num.*heads
    | num_.*(layers|heads|groups|experts.*) | n_(layers?|heads?|embd|inner|groups?|routed_experts|shared_experts) | multi_query
    | .*(rope|rotary).* | .*norm.* | .*eps(ilon)? | .*_act | .*activation.* | act_fn | swiglu.*
    | .*window.* | .*layer_types?.* | .*block_types? | .*layer_ind(ices|exes) | layer_group_size | .*chunk_size | .*sink.*
    | alibi | .*_bias | is_causal | use_bidirectional.* | attention_(type.*|k_eq_v) | attn_(type|config) | use_attention_gate
    | per_layer_config | .*soft_?cap.* | .*pre_attn_scalar | .*multipliers? | .*scal(e|ing)(_.*)? | .*clip.*
    | .*temperature_tuning | .*limit | .*expert.* | .*moe.* | .*router?.* | .*routing.* | scoring_func | topk_.*
    | .*parallel_(attn|residual) | .*_interval | .*_every.* | .*decoder_architecture | .*sparse_step | first_k_dense.*
    | use_long_context | mlp_only_layers | position_embedding_type | use_.*position_embeddings | .*pos_emb.*""",
    re.VERBOSE,
)
_IRRELEVANT = re.compile(
    r""".*drop(out)?.* | .*loss.* | .*coef.* | .*jitter.* | output_.* | .*_token.*ids? | num_labels | .*init.*
    | .*(classifier|summary).* | chunk_size_feed_forward | .*checkpoint.* | pretraining_tp""",
    re.VERBOSE,
)
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
# the first tokens may not reveal these
_FAR = re.compile(".*window.*|.*chunk_size|.*temperature_tuning|floor_scale|layer_types|no_rope.*")
_PER_LENGTH = ("dynamic", "longrope", "yarn")  # frequencies depend on the length that the model was made for
_NEUTRAL = re.compile(r".*multiplier|.*factor|.*scal(e|ing)(_.*)?")  # fields where 1 has no effect


def relevant_settings(model: Any) -> dict[str, Any]:
    """Return the text configuration's fields that keys and values depend on, by name."""
    config = model.config.get_text_config(decoder=True).to_dict()
    found = {name: _value(name, value) for name, value in config.items() if _is_relevant(name) and name not in _ROPE}
    found["rope"] = _rope(config)
    return {name: value for name, value in sorted(found.items()) if not _is_default(name, value)}


def conflict(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return a description of a field that distinguishes two models' `relevant_settings`, or None.

    A field that only one of them has may be one that a release began to write down. Recomputed rows
    then show whether it matters, except for fields that take effect from some length on.
    """
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name) and ((name in before and name in now) or _FAR.fullmatch(name)):
            return f"{name} was {str(before.get(name))[:200]} and is {str(now.get(name))[:200]}"
    return None


def _is_relevant(name: str) -> bool:
    return not name.startswith("_") and bool(_RELEVANT.fullmatch(name)) and not _IRRELEVANT.fullmatch(name)


def _value(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        pairs = ((str(key), _value(str(key), each)) for key, each in value.items())
        return {key: each for key, each in sorted(pairs) if not (_IRRELEVANT.fullmatch(key) or _is_default(key, each))}
    if isinstance(value, list | tuple):
        return [_value(name, each) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _is_default(name: str, value: Any) -> bool:
    """Return True if a value is the default of a field of this name."""
    empty = value is None or value is False or value in ([], {})
    return bool(empty or (value == 1 and not isinstance(value, bool) and _NEUTRAL.fullmatch(name)))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE's parameters in one form.

    Releases have had them in a dictionary, beside it, and per kind of layer.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    per_kind = {kind: each for kind, each in given.items() if isinstance(each, dict)} or {"": given}
    found: dict[str, Any] = {}
    for kind, parameters in per_kind.items():
        beside = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
        own = {**beside, **parameters}
        older = own.pop("type", None)
        own["rope_type"] = own.get("rope_type") or older or "default"
        if own["rope_type"] in _PER_LENGTH:
            own["made_for"] = config.get("max_position_embeddings")
            own["original"] = config.get("original_max_position_embeddings")
        found[kind] = _value("rope", own)
    return found
