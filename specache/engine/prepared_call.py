"""Run a call whose arguments transformers' `generate` has prepared, on an engine over its cache."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from specache.cache.cache import SpeCache
from specache.config import SpeCacheConfig
from specache.engine.admission import check_room, planned_sequences
from specache.engine.attention_hook import attached
from specache.engine.auto_tier import FreeMemory, decide_tier
from specache.engine.chunked_prefill import Progress
from specache.engine.continuing import (
    full_texts,
    note_pending_tokens,
    refuse_padding_behind_answers,
    sequence_per_text,
    warn_of_rereading,
)
from specache.engine.engine import Engine
from specache.engine.handle import Request
from specache.engine.model_arguments import check_position_ids
from specache.engine.request import (
    cache_for,
    check_prompt_lengths,
    check_sequences,
    check_vocabulary,
    chunk_size,
    stored_new_tokens,
    unpadded_rows,
    user_cache,
)
from specache.engine.sampling import GenerationState, SamplingParams
from specache.engine.whole_text import one_row_each
from specache.model.identity.wrappers import unwrapped
from specache.model.info import ModelInfo
from specache.platform import modes


def run_prepared(
    model: Any,
    input_ids: Tensor,
    config: SpeCacheConfig | None,
    streamer: Any,
    progress: Progress | None,
    *,
    past_key_values: Any = None,
    **arguments: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Prefill and decode in PyTorch's default modes, with exclusive use of the given cache."""
    with modes.ours(), ExitStack() as stack:
        modes.check_process()
        if isinstance(past_key_values, SpeCache):
            stack.enter_context(past_key_values.in_use.by("generate"))
        return _run_exclusively(model, input_ids, config, streamer, progress, past_key_values=past_key_values, **arguments)


def _run_exclusively(
    model: Any,
    input_ids: Tensor,
    config: SpeCacheConfig | None,
    streamer: Any,
    progress: Progress | None,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    position_ids: Any = None,
    pad: int | None = None,
    passed: Tensor | None = None,
    streamer_has_prompt: bool = False,
    **prepared: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generate from the arguments that stock generate prepared.

    Args:
        pad: the token that can only be padding, if the mask was inferred from it.
        passed: what the caller passed of the texts `input_ids`, for the streamer; `None` for all.
        prepared: further arguments of stock generate, checked earlier and ignored.
    """
    model = unwrapped(model)
    given = None
    finished = False
    cache: SpeCache | None = None
    try:
        given = user_cache(past_key_values)
        new = unpadded_rows(input_ids, attention_mask)
        cache = cache_for(model, config, given)
        width = getattr(generation_config, "_mask_length", None) if attention_mask is None else None
        token_ids = checked_texts(model, cache, new, input_ids, attention_mask, position_ids, width)
        refuse_padding_behind_answers(cache, token_ids, pad)
        params = SamplingParams.of(logits_processor, stopping_criteria, generation_config)
        chunk = chunk_size(generation_config) or cache.config.prefill_chunk
        request = Request(
            token_ids=token_ids,
            state=GenerationState.start(input_ids, params),
            params=params,
            stored_new_tokens=stored_new_tokens(generation_config, input_ids),
            chunk=chunk,
            streamer=streamer,
            progress=progress,
        )
        kept = given is not None or generation_config.return_dict_in_generate
        with sequence_per_text(cache, len(token_ids), lambda: request.state.new_token_ids() is not None):
            check_memory(model, cache, token_ids, request.stored_new_tokens, chunk)
            if streamer is not None and not streamer_has_prompt:
                with modes.callers():
                    streamer.put((input_ids if passed is None else one_row_each(passed, len(input_ids))).cpu())
            with attached(model), _recording_model(cache, model, kept):
                _run(model, cache, request)
        finished = True
    finally:
        keep = given is not None or (finished and generation_config.return_dict_in_generate)
        if cache is not None and not keep:
            cache.close()
    if not generation_config.return_dict_in_generate:
        return request.state.input_ids
    return GenerateDecoderOnlyOutput(
        sequences=request.state.input_ids,
        scores=tuple(request.state.scores) if params.record_scores else None,
        logits=tuple(request.state.logits) if params.record_logits else None,
        past_key_values=cache,
    )


def checked_texts(
    model: Any,
    cache: SpeCache,
    new: list[list[int]],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Any,
    width: int | None = None,
) -> list[list[int]]:
    """Return a call's checked full texts [B][tokens], stored tokens included (`full_texts`)."""
    check_sequences(cache, new)
    token_ids = full_texts(cache, new, input_ids.shape[1], attention_mask, width)
    check_texts(model, cache.info, new, token_ids, position_ids)
    return token_ids


def check_texts(model: Any, info: ModelInfo, new: list[list[int]], token_ids: list[list[int]], position_ids: Any) -> None:
    check_vocabulary(model, token_ids)
    check_prompt_lengths(token_ids, info)
    if position_ids is not None:
        check_position_ids(position_ids, new, token_ids)


def check_memory(model: Any, cache: SpeCache, token_ids: list[list[int]], new_tokens: int, chunk: int) -> None:
    """Decide the slow tier and refuse a batch that does not fit, before prefill begins."""
    planned = planned_sequences(cache.sequences, token_ids, new_tokens)
    decide_tier(cache, planned, chunk, FreeMemory(model))
    check_room(cache, planned, chunk)
    warn_of_rereading(cache, token_ids)


def _run(model: Any, cache: SpeCache, request: Request) -> None:
    """Run a request on an engine over the cache, and release the device batch afterwards."""
    request.sequences = list(cache.sequences)
    try:
        Engine.over(model, cache).run(request)
    finally:
        try:
            cache.release_device_batch()
        finally:
            note_pending_tokens(request.sequences, request.token_ids, request.state.new_token_ids())


def _recording_model(cache: SpeCache, model: Any, kept: bool) -> AbstractContextManager[None]:
    """Record the model's state in a cache that is kept after the call."""
    return cache.filled_by(model) if kept else nullcontext()
