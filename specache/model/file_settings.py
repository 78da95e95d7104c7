"""Generation settings that come from a model's files rather than from the caller.

A caller's own setting that specache does not support is refused. The same setting in the model's
generation_config.json or config.json is replaced, since those files were written for any library:
silently where the output stays the same, otherwise with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specache.errors import UsageError

DEFAULT_NEW_TOKENS = 20  # default of stock generate
_ADVICE = "Use greedy or sampled decoding (num_beams=1), or the model's stock generate()."
_LEFT_OUT = "is not available: no step holds the attention of a whole layer. Leave it out."


@dataclass(frozen=True)
class Unavailable:
    """A generation setting that specache does not support for some values.

    Attributes:
    is_unsupported: returns True for an unsupported value.
        instead: replacement for a value from the model's files.
        effect: effect of the replacement on the output, for the warning; None if there is none.
        refusal: message for a caller who passed it, with `{value}`.
    """

    name: str
    is_unsupported: Callable[[Any], bool]
    instead: Any
    effect: str | None
    refusal: str


def _mode(
    name: str, is_unsupported: Callable[[Any], bool], instead: Any, effect: str | None, label: str | None = None
) -> Unavailable:
    return Unavailable(name, is_unsupported, instead, effect, f"specache cannot decode with {label or name}. {_ADVICE}")


def _is_set(value: Any) -> bool:
    return value is not None


_GREEDY = "greedy or sampled decoding is used instead, which gives other text"
UNAVAILABLE = (
    _mode("num_beams", lambda value: (value or 1) > 1, 1, _GREEDY),
    _mode("penalty_alpha", bool, None, _GREEDY, "penalty_alpha (contrastive search)"),
    _mode("dola_layers", _is_set, None, _GREEDY),
    _mode("constraints", bool, None, _GREEDY),
    _mode("force_words_ids", bool, None, _GREEDY, "constraints (force_words_ids)"),
    _mode("prompt_lookup_num_tokens", _is_set, None, None),  # these draft the same tokens as ordinary decoding
    _mode("assistant_early_exit", _is_set, None, None),
    _mode("use_mtp", bool, None, None),
    Unavailable("output_attentions", bool, False, "the output has no attentions", f"output_attentions {_LEFT_OUT}"),
    Unavailable(
        "output_hidden_states",
        bool,
        False,
        "the output has no hidden states",
        "output_hidden_states is not available from specache. Leave it out.",
    ),
    Unavailable(
        "use_cache",
        lambda value: value is False,
        True,
        None,
        "use_cache=False contradicts specache, which is a cache. Leave it out.",
    ),
    Unavailable(
        "cache_implementation",
        _is_set,
        None,
        None,
        "cache_implementation={value!r} names one of transformers' own caches. Leave it out; specache's settings go into "
        "SpeCacheConfig.",
    ),
    Unavailable(
        "token_healing",
        bool,
        False,
        "the last token of the prompt stays as it is",
        "token_healing is not available. Leave it out, and pass model.heal_tokens(input_ids, tokenizer) as the prompt.",
    ),
)
_ONLY_IN_THE_OUTPUT = {"output_attentions", "output_hidden_states"}


class GenerationSettings:
    """The settings of one call: the caller's arguments, the passed GenerationConfig, and the
    model's files.

    Args:
        typed: keyword arguments of the call.
        config: the GenerationConfig that was passed. Values equal to the model's own count as the
            files', since pipelines copy them.
    """

    def __init__(self, model: Any, typed: Mapping[str, Any], config: Any = None) -> None:
        self._files = getattr(model, "generation_config", None)
        self._typed = typed
        self._config = config

    def value(self, name: str) -> Any:
        """Return the effective value; None if it is not set."""
        if name in self._typed:
            return self._typed[name]
        value = getattr(self._config, name, None)
        return getattr(self._files, name, None) if value is None else value

    def is_typed(self, name: str) -> bool:
        """Return True if the effective value comes from the caller."""
        if name in self._typed:
            return True
        value = getattr(self._config, name, None)
        return value is not None and value != getattr(self._files, name, None)

    def replacements(self) -> dict[str, Any]:
        """Return replacements for unsupported settings of the model's files.

        Warn if the output changes.

        Raises:
            UsageError: the caller passed an unsupported setting; the message names it.
        """
        found: dict[str, Any] = {}
        for setting in UNAVAILABLE:
            value = self.value(setting.name)
            if not setting.is_unsupported(value):
                continue
            if self.is_typed(setting.name):
                raise UsageError(setting.refusal.format(value=value))
            found[setting.name] = setting.instead
            shows = setting.name not in _ONLY_IN_THE_OUTPUT or self.value("return_dict_in_generate")
            if setting.effect is not None and shows:
                _warn(f"The model's files set {setting.name}={value!r}, which specache cannot do: {setting.effect}.")
        if "num_beams" in found and (self.value("num_return_sequences") or 1) > 1 and not self.value("do_sample"):
            found |= self._one_answer()
        return found

    def padding_token(self) -> int | None:
        """Return the token that is only padding; None if it also ends a text, as in stock
        generate.
        """
        pad, ends = self.value("pad_token_id"), self.value("eos_token_id")
        if isinstance(ends, Tensor):
            ends = ends.flatten().tolist()
        return None if pad in (ends if isinstance(ends, list) else [ends]) else pad

    def max_length(self, prompt_tokens: int) -> dict[str, Any]:
        """Return a replacement for the files' `max_length` if it leaves no room behind the prompt.

        Raises:
            UsageError: the caller passed such a `max_length`.
        """
        limit = self.value("max_length")
        if limit is None or limit > prompt_tokens or self.value("max_new_tokens") is not None:
            return {}
        if self.is_typed("max_length"):
            raise UsageError(
                f"max_length={limit:,} counts the prompt, which has {prompt_tokens:,} tokens already. Pass max_new_tokens instead."
            )
        _warn(
            f"The model's files set max_length={limit:,}, and the prompt has {prompt_tokens:,} tokens already: "
            f"{DEFAULT_NEW_TOKENS} new ones are generated. Pass max_new_tokens."
        )
        return {"max_length": prompt_tokens + DEFAULT_NEW_TOKENS}

    def stop_strings(self, tokenizer: Any) -> list[str] | str | None:
        """Return the stop strings, which need a tokenizer.

        Raises:
            UsageError: the caller passed some without a tokenizer.
        """
        texts = self.value("stop_strings")
        if not texts or tokenizer is not None:
            return texts or None
        if self.is_typed("stop_strings"):
            raise UsageError("stop_strings needs tokenizer=, to know which tokens can end in them.")
        _warn(
            f"The model's files set stop_strings={texts!r}, which nothing stops at without tokenizer=. Pass the model's tokenizer."
        )
        return None

    def _one_answer(self) -> dict[str, Any]:
        """Return the replacement for several beams of a search, since there is no search."""
        if self.is_typed("num_return_sequences"):
            raise UsageError(
                "num_return_sequences needs sampling: the model's files set num_beams, which specache cannot do. Pass "
                "do_sample=True."
            )
        return {"num_return_sequences": 1}


def one_row_per_answer(
    input_ids: Tensor, arguments: dict[str, Any], replacements: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Undo stock generate's repetition of prompts per beam, if the beams were replaced.

    Args:
        input_ids: [B * max(beams, answers), S]; likewise the mask and positions among `arguments`.

    Returns:
        input_ids [B * answers, S], and the arguments likewise.
    """
    if "num_beams" not in replacements:
        return input_ids, arguments
    config = arguments["generation_config"]
    answers = replacements.get("num_return_sequences", config.num_return_sequences or 1)
    repeats = max(config.num_beams, config.num_return_sequences or 1)
    rows = [row for row in range(len(input_ids)) if row % repeats < answers]
    cut = {name: arguments[name][rows] for name in ("attention_mask", "position_ids") if arguments.get(name) is not None}
    return input_ids[rows], {**arguments, **cut}


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
