"""One family against its stock `generate()`: equal, refused with a reason, or not tried."""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import specache
from tests.families.configs import tiny_config
from tests.tiny import prompt

NEW = 12
PROMPT = 150  # longer than the windows of the tiny models
MOST_PARAMETERS = 60_000_000
TOLERANCE = 1e-3
SETTINGS: dict[str, dict[str, Any]] = {
    "on-demand": {"policy": "on-demand"},
    "verified": {"policy": "verified", "slow_tier": "ram"},
    "full": {"policy": "full"},
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one family.

    Attributes:
        model_type, model_class: the family.
        result: `equal`, `refused`, `not tried` (stock does not run it), or a bug: `wrong`, `error`.
        reason: why it is not `equal`.
        attention: a hash of the attention layers' code; copied families have the same.
    """

    model_type: str
    model_class: str
    result: str
    reason: str = ""
    attention: str = ""


def families() -> list[tuple[str, str]]:
    """Return (model type, class) of every causal-LM class of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())


def vision_families() -> list[tuple[str, str]]:
    """Return the same for further vision-language classes, which also run text."""
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
    return sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()) - known)


def build(model_class: str) -> Any:
    """Return the family's tiny model, seeded, with constant parameters randomised too."""
    kind = getattr(transformers, model_class)
    config = tiny_config(kind.config_class)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"no small configuration: {size:,} parameters")
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and (parameter == parameter.flatten()[0]).all():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def try_family(model_type: str, model_class: str) -> Outcome:
    """Run one family under every setting, and in stock."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(model_class)
            expected = _generate(model.generate)
        except Exception as error:  # of transformers, for a model that it cannot build or run
            return Outcome(model_type, model_class, "not tried", _line(error))
        if not all(bool(torch.isfinite(x).all()) for x in expected):
            return Outcome(model_type, model_class, "not tried", "the logits of stock are not finite")
        results = {name: _against(model, expected, settings) for name, settings in SETTINGS.items()}
    return Outcome(model_type, model_class, *_worst(results), _attention(model))


def refusal(model_class: str) -> str:
    """Return why a family is refused, without running it; empty if it is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(model_class)
        try:
            specache.generate(model, prompt(40), max_new_tokens=2, do_sample=False)
        except specache.UnsupportedModelError as error:
            return str(error)
    return ""


def _worst(results: dict[str, tuple[str, str]]) -> tuple[str, str]:
    for kind in ("error", "wrong"):
        for name, (result, reason) in results.items():
            if result == kind:
                return kind, f"{name}: {reason}"
    if len({result for result, _ in results.values()}) > 1:
        return "wrong", f"refused under some settings only: {results}"
    return results["on-demand"]


def _against(model: Any, expected: tuple[Tensor, Tensor], settings: dict[str, Any]) -> tuple[str, str]:
    config = specache.SpeCacheConfig(top_k=10**6, group_size=16, residual=16, prefill_chunk=40, **settings)
    try:
        tokens, logits = _generate(lambda *a, **k: specache.generate(model, *a, config=config, **k))
    except specache.UnsupportedModelError as error:
        return "refused", str(error)
    except Exception as error:
        return "error", _line(error)
    difference = float((logits - expected[1]).abs().max()) if logits.shape == expected[1].shape else float("nan")
    same = torch.equal(tokens, expected[0])
    if not difference < TOLERANCE or not same:
        return "wrong", f"logits differ by {difference:.2g}; tokens {'equal' if same else 'differ'}"
    return "equal", ""


def _generate(generate: Any) -> tuple[Tensor, Tensor]:
    ids = prompt(PROMPT)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = generate(ids, attention_mask=torch.ones_like(ids), **options)
    if isinstance(output.past_key_values, specache.SpeCache):
        output.past_key_values.close()
    return output.sequences, torch.stack(output.logits)


def _attention(model: Any) -> str:
    """Return a hash of the code of modules with a layer index, without class names and comments."""
    kinds = {type(module) for module in model.modules() if getattr(module, "layer_idx", None) is not None}
    sources = [inspect.getsource(kind.forward) for kind in sorted(kinds, key=lambda kind: kind.__name__)]
    bare = [re.sub(r'""".*?"""|#[^\n]*|\s+', " ", re.sub(r"\b[A-Z]\w+", "X", source), flags=re.DOTALL) for source in sources]
    return hashlib.sha256("".join(bare).encode()).hexdigest()[:12]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
