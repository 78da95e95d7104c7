"""Apply settings of a GGUF file that transformers' reader drops, such as RoPE scaling.

Settings that the model's configuration can express are written into it. Others are refused, so that
no file runs as a different model. `none` and neutral values (a factor of 1) count as unset.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from specache.errors import SpeCacheError

if TYPE_CHECKING:
    from gguf import GGUFReader

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # values of every released Llama 3 model
LLAMA3_POSITIONS = 8192  # positions that they were first trained on
CLOSE = 1e-4  # relative tolerance; GGUF stores float32
NOT_TURNED = 1e9  # a RoPE factor above it stands for a frequency of zero
LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}  # sizes that scale queries differently from smaller ones, which no key states

_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_NEUTRAL: dict[str, Any] = {  # key -> the value with which it has no effect
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.output_scale": 1.0,
    "attention.temperature_length": 0,
    "attention.temperature_scale": 0.0,
    "attention.causal": True,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "router_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "expert_weights_scale": 1.0,
    "rope.scaling.alpha": 0.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}
_WRITTEN = ("attn_logit_softcapping", "final_logit_softcapping")  # keys that become a configuration field of the same name
_EQUIVALENT: dict[str, tuple[str, ...]] = {  # key -> equivalent fields of configurations
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.scale": ("attention_multiplier",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "expert_weights_scale": ("routed_scaling_factor",),
}


class GgufSettingError(SpeCacheError):
    """A setting of a GGUF file that the model's configuration cannot express."""


def apply_settings(config: Any, reader: GGUFReader) -> None:
    """Write the file's RoPE, windows and soft caps into the configuration of its model.

    Args:
        reader: of the file; making one takes seconds where the vocabulary is large.

    Raises:
        GgufSettingError: the file has a setting that transformers' model does not support.
    """
    fields, factors = _read(reader)
    text = config.get_text_config(decoder=True)
    _set_base(text, fields)
    _set_rotary_part(text, fields)
    scaling = _rope_scaling(fields, factors, text)
    if scaling is not None:
        _set_rope(text, scaling)
    _set_window(text, fields)
    _set_attention_and_caps(text, fields)
    _refuse_unsupported(text, fields)


def _read(reader: GGUFReader) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return the architecture's fields, without its name as prefix, and the RoPE factors."""
    architecture = reader.get_field("general.architecture")
    prefix = "" if architecture is None else f"{architecture.contents()}."
    fields = {key[len(prefix) :]: field.contents() for key, field in reader.fields.items() if key.startswith(prefix)}
    names = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    return fields, {tensor.name: tensor.data.flatten().tolist() for tensor in reader.tensors if tensor.name in names}


def _rope_scaling(fields: dict[str, Any], factors: dict[str, list[float]], config: Any) -> dict[str, Any] | None:
    """Return RoPE's scaling parameters in transformers' form, without the base.

    Return None if it is not scaled.
    """
    kind = fields.get("rope.scaling.type") or "linear"  # as llama.cpp reads a factor without a type
    factor = float(fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0)
    original = fields.get("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in factors and "rope_factors_short.weight" in factors:
        return _longrope(fields, factors["rope_factors_short.weight"], factors["rope_factors_long.weight"], config)
    if "rope_freqs.weight" in factors:
        if _is_proportional(config, factors["rope_freqs.weight"]):
            return None
        if kind not in ("none", "llama3") and factor != 1.0:
            raise GgufSettingError(f"the file stretches RoPE twice, by rope_freqs.weight and by scaling {kind!r}. Convert it anew.")
        return _by_factors(factors["rope_freqs.weight"], original, config)
    if kind == "yarn":
        unstretched = original or max(1, round(int(config.max_position_embeddings) / factor))
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": unstretched}
        scaling |= {
            ours: float(fields[f"rope.scaling.{theirs}"]) for theirs, ours in _YARN.items() if f"rope.scaling.{theirs}" in fields
        }
        attention = float(fields.get("rope.scaling.attn_factor") or 1.0)
        if attention != 1.0:  # on top of yarn's own factor
            scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
        if config.model_type == "gpt_oss":  # it does not round the bounds of yarn's ramp, which no key states
            scaling["truncate"] = False
        return scaling
    if kind == "linear" or "rope.scale_linear" in fields:
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind != "none":
        raise GgufSettingError(f"the file stretches RoPE in a way that is not known here: {kind!r}. Use its original weights.")
    return None


def _is_proportional(config: Any, factors: list[float]) -> bool:
    """Return True if the configuration already describes partial rotation, as in Gemma 4.

    Raises:
        GgufSettingError: the file rotates only some frequencies, and the configuration does not.
    """
    turned = sum(each < NOT_TURNED for each in factors)
    if turned == len(factors):
        return False
    own = _parameters(config)
    plain = all(abs(each - 1.0) < CLOSE for each in factors[:turned])
    if own.get("rope_type") == "proportional" and plain and turned == int(own.get("partial_rotary_factor", 1.0) * len(factors)):
        return True
    raise GgufSettingError(
        "the file turns only some frequencies of RoPE, which its configuration cannot say. Use its original weights."
    )


def _longrope(fields: dict[str, Any], short: list[float], long: list[float], config: Any) -> dict[str, Any]:
    original = fields.get("rope.scaling.original_context_length") or getattr(config, "original_max_position_embeddings", None)
    if not original:
        raise GgufSettingError("the file has RoPE factors for long and short texts, but not the length that parts them.")
    scaling = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": int(original),
    }
    if attention := fields.get("rope.scaling.attn_factor"):
        scaling["attention_factor"] = float(attention)
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = int(original)
    return scaling


def _by_factors(factors: list[float], original: int | None, config: Any) -> dict[str, Any] | None:
    """Return scaling with one factor per frequency.

    It has Llama 3's form if that fits, else the same factors at every length.
    """
    if all(abs(each - 1.0) < CLOSE for each in factors):
        return None
    positions = int(config.max_position_embeddings)
    first = {"rope_type": "llama3", "factor": max(factors), **LLAMA3_ROPE}
    for length in dict.fromkeys([original or LLAMA3_POSITIONS, LLAMA3_POSITIONS, round(positions / max(factors))]):
        scaling = {**first, "original_max_position_embeddings": int(length)}
        if _all_close(_llama3_factors(scaling, _base(config), len(factors)), factors):
            return scaling
    same = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    return {"rope_type": "longrope", **same, "original_max_position_embeddings": positions}


def _llama3_factors(scaling: dict[str, Any], base: float, count: int) -> list[float]:
    """Return the factors by which Llama 3's form divides each frequency."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    found = []
    for index in range(count):
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi * base ** (index / count))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return found


def _all_close(mine: list[float], theirs: list[float]) -> bool:
    return all(abs(a - b) <= CLOSE * abs(b) for a, b in zip(mine, theirs, strict=True))


def _parameters(config: Any) -> dict[str, Any]:
    """Return RoPE's parameters, those of full attention if layer kinds differ.

    Return a new dictionary if there are none.
    """
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    full = parameters.get("full_attention")
    return full if isinstance(full, dict) else parameters


def _base(config: Any) -> float:
    return float(_parameters(config).get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)


def _set_base(config: Any, fields: dict[str, Any]) -> None:
    """Set RoPE's base, which the reader drops for StarCoder2, StableLM and Gemma 4."""
    base = fields.get("rope.freq_base")
    if base and "rope_theta" in _parameters(config):
        _parameters(config)["rope_theta"] = float(base)
    sliding = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if isinstance(sliding, dict) and (base := fields.get("rope.freq_base_swa")):
        sliding["rope_theta"] = float(base)


def _set_rotary_part(config: Any, fields: dict[str, Any]) -> None:
    """Set the rotated part of each head, where the model has such a setting.

    Examples are Phi-4-mini, StableLM and Nemotron.
    """
    turned, parameters = fields.get("rope.dimension_count"), getattr(config, "rope_parameters", None) or {}
    if not isinstance(turned, int) or "partial_rotary_factor" not in parameters:
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if 0 < turned <= head and turned != int(head * parameters["partial_rotary_factor"]):
        parameters["partial_rotary_factor"] = turned / head


def _set_rope(config: Any, scaling: dict[str, Any]) -> None:
    """Set RoPE's scaling. In a model with two kinds of layers, only full attention is scaled."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if isinstance(parameters.get("full_attention"), dict):
        full = parameters["full_attention"]
        parameters["full_attention"] = {**_kept(full), **scaling}
    else:
        parameters = {**_kept(parameters), **scaling}
        parameters.setdefault("rope_theta", _base(config))
    config.rope_parameters = parameters


def _kept(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}


def _set_window(config: Any, fields: dict[str, Any]) -> None:
    """Set a window that is shorter than the positions."""
    window = fields.get("attention.sliding_window")
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(window, int) or window <= 0 or (positions is not None and window >= positions):
        return
    if getattr(config, "sliding_window", None) == window:
        return
    if not hasattr(config, "sliding_window"):
        raise GgufSettingError(
            f"the file's attention slides over {window:,} tokens, which {type(config).__name__} has no setting for. Use its "
            "original weights."
        )
    config.sliding_window = window


def _set_attention_and_caps(config: Any, fields: dict[str, Any]) -> None:
    """Set soft caps, and the query scale if only the model's size determines it."""
    for key in _WRITTEN:
        if fields.get(key) and hasattr(config, key):
            setattr(config, key, float(fields[key]))
    if config.num_hidden_layers == LAYERS_OF_27B.get(config.model_type):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _refuse_unsupported(config: Any, fields: dict[str, Any]) -> None:
    wrong = [key for key, neutral in _NEUTRAL.items() if key in fields and not _is_covered(config, key, fields[key], neutral)]
    dimension = fields.get("attention.key_length")
    head = _head_dim(config)
    if isinstance(dimension, int) and head is not None and dimension not in (head, getattr(config, "global_head_dim", None)):
        wrong.append("attention.key_length")
    if wrong:
        raise GgufSettingError(
            f"transformers' reader of GGUF files drops what this one says in {', '.join(sorted(wrong))}, so that the model would "
            "compute something else. Use its original weights (a folder or a hub name)."
        )


def _head_dim(config: Any) -> int | None:
    """Return the head dimension; None if no field states it, or if layers differ (Gemma 4)."""
    try:
        head = getattr(config, "head_dim", None)
    except Exception:  # transformers raises an error without a public name if layers differ
        return None
    return head if isinstance(head, int) else None


def _is_covered(config: Any, key: str, value: Any, neutral: Any) -> bool:
    """Return True if a field's value is neutral, or the configuration has the same value."""
    if value == neutral or (isinstance(neutral, float) and not value):
        return True
    for name in _EQUIVALENT.get(key, ()):
        mine = getattr(config, name, None)
        if isinstance(mine, int | float) and (
            math.isclose(mine, value, rel_tol=CLOSE) or math.isclose(mine, 1 / value, rel_tol=CLOSE)
        ):
            return True
    return False
