"""`generate`, `decode` and `prefill`: the interface of transformers' `generate` over the engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, StopStringCriteria

from specache.cache.cache import SpeCache
from specache.config import SpeCacheConfig
from specache.engine.admission import planned_sequences
from specache.engine.attention_hook import attached, stock_generate_arguments
from specache.engine.chunked_prefill import Progress, last_of
from specache.engine.continuing import (
    refuse_padding_behind_answers,
    sequence_per_text,
)
from specache.engine.decoder import Decoder
from specache.engine.handle import Request
from specache.engine.model_arguments import PASSED_ON, PREPARED, check_model_arguments, model_arguments
from specache.engine.prefilling import prefill_texts
from specache.engine.prepared_call import check_memory, check_texts, checked_texts, run_prepared
from specache.engine.recovery import tokens_kept_on_error
from specache.engine.request import (
    check_cache,
    check_decoding_loop,
    check_max_new_tokens,
    check_request,
    check_types,
    chunk_size,
    inferred_mask,
    prompt_ids,
    stored_new_tokens,
    unpadded_rows,
)
from specache.engine.sampling import ClosingStreamer, GenerationState, SamplingParams
from specache.engine.whole_text import rows_of_answers, warn_of_unseen_text, whole_texts, with_passed_tokens
from specache.errors import UsageError
from specache.model.file_settings import GenerationSettings, one_row_per_answer
from specache.model.identity.wrappers import unwrapped
from specache.model.info import inspect_model
from specache.platform import modes


@torch.compiler.disable  # a compiled caller runs this eagerly
def generate(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    attention_mask: Tensor | None = None,
    config: SpeCacheConfig | None = None,
    streamer: Any = None,
    past_key_values: SpeCache | None = None,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generate as `model.generate` does, over a SpeCache.

    Args:
        input_ids, attention_mask: [B, S], padded on the left. `inputs` is another name of
            `input_ids`, as in `model.generate`.
        config: settings of the new cache; not allowed together with `past_key_values`.
        streamer: gets the prompt and each step's tokens, and is always ended.
        past_key_values: a SpeCache to continue from. `input_ids` is the whole conversation so far,
            or only the new tokens if `attention_mask` covers the earlier ones too.
        tokenizer: needed with `stop_strings`.
        progress: called with (prompt tokens done, prompt tokens in all) while prefilling.
        **kwargs: everything else that `model.generate` takes. Model inputs that would change the
            result (images, embeddings, other positions, ...) are refused by name.

    Returns:
        LongTensor [B, S + new]: the prompts and the new tokens, right-padded. With
        `return_dict_in_generate` the stock output, whose `past_key_values` is the SpeCache; scores
        and logits of a finished sequence repeat those of its last token.

    Raises:
        SpeCacheError: the request is not supported; the message says what to do.
        OutOfMemoryError, SlowTierError, ...: generation failed. `new_token_ids` of the error has
            the tokens generated before, and a given `past_key_values` can be continued from.
    """
    with ClosingStreamer.of(streamer) as closing:

        def run(model: Any, input_ids: Tensor, **arguments: Any) -> Tensor | GenerateDecoderOnlyOutput:
            return run_prepared(model, input_ids, config, closing, progress, **arguments)

        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        check_types(config, kwargs.get("generation_config"), past_key_values)
        return _prepared(model, run, input_ids, inputs, attention_mask, tokenizer, stop_strings, stopping_criteria, kwargs)


@torch.compiler.disable  # a compiled caller runs this eagerly
def make_request(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int | None = None,
    streamer: Any = None,
    callback: Callable[[int, int], None] | None = None,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Request:
    """Make a request for an `Engine` of this model, with the arguments of `generate`.

    Args:
        seed: seeds a generator of this request. `None` samples from PyTorch's global generator,
            whose numbers depend on the other requests of a step. From -2^63, as in PyTorch, to
            2^64 - 1.
        callback: called with (row, token) of every new token.

    Raises:
        SpeCacheError: the request is not supported; the message says what to do.
    """
    made: list[Request] = []

    def make(
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        **prepared: Any,
    ) -> Tensor:
        with modes.ours():
            token_ids = unpadded_rows(input_ids, attention_mask)
            check_texts(model, inspect_model(model), token_ids, token_ids, position_ids)
            params = SamplingParams.of(logits_processor, stopping_criteria, generation_config)
            if seed is not None:
                params.generator = torch.Generator(input_ids.device).manual_seed(int(seed))
            state = GenerationState.start(input_ids, params)
            stored = stored_new_tokens(generation_config, input_ids)
            chunk = chunk_size(generation_config)
            more = {"streamer": streamer, "callback": callback, "progress": progress, "model": weakref.ref(unwrapped(model))}
            made.append(Request(token_ids, state, params, stored, chunk=chunk, **more))
        return input_ids

    check_types(None, kwargs.get("generation_config"), None)
    check_request(seed, callback, kwargs)
    _prepared(model, make, input_ids, inputs, attention_mask, tokenizer, stop_strings, stopping_criteria, kwargs)
    return made[0]


def _prepared(
    model: Any,
    run: Callable[..., Any],
    input_ids: Tensor | None,
    inputs: Tensor | None,
    attention_mask: Tensor | None,
    tokenizer: Any,
    stop_strings: str | list[str] | None,
    stopping_criteria: StoppingCriteriaList | None,
    kwargs: dict[str, Any],
) -> Any:
    """Have stock `generate` prepare processors, criteria and settings, and call `run` with them.

    `run` takes the place of stock generate's own decoding loop.
    """
    inspect_model(model)  # refuses an unsupported model before stock generate runs
    if not hasattr(model, "generate"):  # a wrapper such as DataParallel
        model = unwrapped(model)
    inner = unwrapped(model)
    check_decoding_loop(kwargs)
    position_ids = kwargs.pop("position_ids", None)
    given = {name: kwargs.pop(name) for name in ("past_key_values",) if name in kwargs}
    of_model = model_arguments(inner, kwargs, kwargs.get("generation_config"))
    check_model_arguments(inner, of_model)
    kwargs = {name: value for name, value in kwargs.items() if name not in of_model}
    check_max_new_tokens(kwargs.get("max_new_tokens"))
    input_ids = prompt_ids(input_ids, inputs)
    typed = kwargs if stop_strings is None else {**kwargs, "stop_strings": stop_strings}
    settings = GenerationSettings(model, typed, kwargs.get("generation_config"))
    pad = settings.padding_token() if attention_mask is None else None
    with modes.ours():
        if attention_mask is None:
            attention_mask = inferred_mask(input_ids, pad)
        unpadded_rows(input_ids, attention_mask)
        answers = settings.value("num_return_sequences") or 1
        several = rows_of_answers(given.get("past_key_values"), input_ids, attention_mask, answers)
        if several is not None and settings.value("do_sample"):
            input_ids, attention_mask = several
            kwargs["num_return_sequences"] = 1
        passed = input_ids
        whole = whole_texts(given.get("past_key_values"), input_ids, attention_mask, position_ids)
    if whole is not None:
        (input_ids, attention_mask), position_ids = whole, None
    stops = settings.stop_strings(tokenizer)
    if stops is not None:
        stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
        stopping_criteria.append(StopStringCriteria(tokenizer, stops))
    kwargs = {**kwargs, **settings.replacements(), **settings.max_length(input_ids.shape[1])}
    if settings.value("stop_strings") is not None:
        kwargs["stop_strings"] = None  # replaced by the criterion above

    def custom_generate(model: Any, input_ids: Tensor, **arguments: Any) -> Any:
        return run(model, input_ids, **arguments | {"position_ids": position_ids, "pad": pad, "passed": passed})

    arguments = {"attention_mask": attention_mask, "stopping_criteria": stopping_criteria, **given}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    output = model.generate(input_ids, custom_generate=custom_generate, **arguments, **kwargs)
    return output if whole is None else with_passed_tokens(output, passed, input_ids.shape[1])


@torch.compiler.disable  # a compiled caller runs this eagerly
def decode(
    model: Any,
    input_ids: Tensor,
    config: SpeCacheConfig | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode for `model.generate(..., custom_generate=specache.decode, config=..., progress=...)`.

    Stock `generate` does not pass `tokenizer` to a callable, so stop strings need
    `specache.generate`.
    """
    passed = stock_generate_arguments()
    typed = {name: value for name, value in arguments.items() if name not in PREPARED} if passed is None else passed
    with ClosingStreamer.of(typed.get("streamer")) as streamer:
        check_decoding_loop(typed)
        check_types(config, arguments.get("generation_config"), None)
        if arguments.get("generation_config") is None:
            raise UsageError("decode is for model.generate(..., custom_generate=specache.decode). Call specache.generate instead.")
        of_model = model_arguments(model, typed)
        check_model_arguments(model, {name: value for name, value in of_model.items() if name not in PASSED_ON})
        if typed.get("position_ids") is None:
            arguments["position_ids"] = None  # made by stock generate, not passed by the caller
        effective = arguments["generation_config"]
        settings = GenerationSettings(model, typed, effective)
        replacements = settings.replacements()
        input_ids, arguments = one_row_per_answer(input_ids, arguments, replacements)
        for name, value in replacements.items():
            setattr(effective, name, value)
        if typed.get("attention_mask") is None:  # stock generate masks pad tokens inside a text too
            arguments["pad"] = settings.padding_token()
            with modes.ours():
                arguments["attention_mask"] = inferred_mask(input_ids, arguments["pad"])
        warn_of_unseen_text(arguments.get("logits_processor"), input_ids, typed.get("attention_mask"))
        return run_prepared(model, input_ids, config, streamer, progress, streamer_has_prompt=True, **arguments)


@torch.compiler.disable  # a compiled caller runs this eagerly
def prefill(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    cache: SpeCache,
    inputs: Tensor | None = None,
    attention_mask: Tensor | None = None,
    progress: Progress | None = None,
    **model_inputs: Any,
) -> None:
    """Prefill `cache` with prompts [B, S], so that `generate` over them decodes at once.

    A cache that is not empty is continued as by `generate`.

    Args:
        model_inputs: further outputs of a tokenizer. Those that would change the keys and values
            are refused by name.

    Raises:
        SpeCacheError: as `generate`.
    """
    modes.check_process()
    check_cache(cache)
    inspect_model(model)
    inner = unwrapped(model)
    settings = GenerationSettings(model if hasattr(model, "generation_config") else inner, {})
    model = inner
    with modes.ours(), cache.in_use.by("prefill"):
        position_ids = model_inputs.pop("position_ids", None)
        check_model_arguments(model, model_inputs)
        input_ids = prompt_ids(input_ids, inputs)
        pad = settings.padding_token() if attention_mask is None else None
        if attention_mask is None:
            attention_mask = inferred_mask(input_ids, pad)
        new = unpadded_rows(input_ids, attention_mask)
        cache.check_model(model)
        token_ids = checked_texts(model, cache, new, input_ids, attention_mask, position_ids)
        refuse_padding_behind_answers(cache, token_ids, pad)
        chunk = cache.config.prefill_chunk
        with sequence_per_text(cache, len(token_ids)):
            check_memory(model, cache, token_ids, 0, chunk)
            keep_tokens = tokens_kept_on_error(cache, lambda: planned_sequences([], token_ids, 0))
            with attached(model), cache.filled_by(model), keep_tokens:
                last_of(prefill_texts(Decoder(model, cache), cache, list(cache.sequences), token_ids, chunk, progress))
