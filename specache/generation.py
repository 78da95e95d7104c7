"""Text generation over a SpeCache: prefill -> pre-decode -> decode, with sampling, stopping and streaming as in transformers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, StopStringCriteria

from specache import modes
from specache.admission import check_room
from specache.answers import Answers, TokenChoice, count_guesses, guess, no_answers_yet, take_tokens, token_choice, with_guesses
from specache.cache import SpeCache
from specache.config import SpeCacheConfig
from specache.decoding import Decoder, Progress
from specache.errors import UsageError
from specache.holdings import SequenceLoad
from specache.integration import attached, stock_generate_arguments
from specache.model import inspect_model
from specache.recovery import tokens_kept
from specache.request import (
    check_generation_config,
    check_max_new_tokens,
    check_model_arguments,
    check_prompt_lengths,
    check_sequences,
    inferred_mask,
    prompts,
    user_cache,
)


@torch.compiler.disable  # of a caller that is compiled, this part runs as it is
def generate(
    model: Any,
    input_ids: Tensor | None = None,
    *,
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
        input_ids, attention_mask: [B, S], padded on the left.
        config: settings of the cache that is made; not with `past_key_values`.
        streamer: gets the prompt, each step's tokens, and is always ended.
        past_key_values: a SpeCache to continue from; `input_ids` is the whole conversation so far (or, with a longer
            `attention_mask`, only what is new).
        tokenizer: needed with `stop_strings`.
        progress: called with (prompt tokens done, in all) while prefilling.
        **kwargs: everything else that `model.generate` takes.

    Returns:
        LongTensor [B, S + new]: prompts in front, padding after the end; or with `return_dict_in_generate` the stock output, whose
        `past_key_values` is the SpeCache. Scores and logits of a sequence that ended are those of its last token.

    Raises:
        SpeCacheError: the request cannot be honoured; the message says what to do.
        OutOfMemoryError, SlowTierError, ...: it failed in the middle. `new_token_ids` of each of our errors has what was
            generated before, and `past_key_values`, if it was given, can be continued from.
    """
    inspect_model(model)  # refused before anything of it runs
    check_model_arguments(kwargs)
    check_max_new_tokens(kwargs.get("max_new_tokens"))
    if input_ids is None:
        raise UsageError("There is no prompt: pass input_ids, a tensor of token ids [batch, length].")
    with modes.ours():
        if attention_mask is None:
            attention_mask = inferred_mask(input_ids, model.generation_config)
        prompts(input_ids, attention_mask)
    if stop_strings is not None:
        if tokenizer is None:
            raise UsageError("stop_strings needs tokenizer=, to know which tokens can end in them.")
        stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
        stopping_criteria.append(StopStringCriteria(tokenizer, stop_strings))

    def custom_generate(model: Any, input_ids: Tensor, **arguments: Any) -> Tensor | GenerateDecoderOnlyOutput:
        return _decode(model, input_ids, config, streamer, progress, **arguments)

    arguments = {"attention_mask": attention_mask, "past_key_values": past_key_values, "stopping_criteria": stopping_criteria}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    return model.generate(input_ids, custom_generate=custom_generate, **arguments, **kwargs)


@torch.compiler.disable  # of a caller that is compiled, this part runs as it is
def decode(
    model: Any,
    input_ids: Tensor,
    config: SpeCacheConfig | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """For `model.generate(..., custom_generate=specache.decode)`; `config=` and `progress=` may be given to `generate` too.

    Stock `generate` drops `tokenizer` on the way to a callable, so stop strings need `specache.generate`.
    """
    dropped = stock_generate_arguments()
    check_model_arguments(dropped)
    return _decode(model, input_ids, config, dropped.get("streamer"), progress, streamer_has_prompt=True, **arguments)


@torch.compiler.disable  # of a caller that is compiled, this part runs as it is
def prefill(
    model: Any,
    input_ids: Tensor,
    *,
    cache: SpeCache,
    attention_mask: Tensor | None = None,
    progress: Progress | None = None,
) -> None:
    """Fill `cache` with prompts [B, S] and generate nothing. A later `generate` over the same prompts starts at once.

    Raises:
        SpeCacheError: as `generate`.
    """
    modes.check_process()
    with modes.ours(), cache.in_use.by("prefill"):
        token_ids = prompts(input_ids, attention_mask)
        check_prompt_lengths(token_ids, cache.info)
        cache.check_model(model)
        check_sequences(cache, token_ids)
        check_room(cache, token_ids, 0, cache.config.prefill_chunk)
        with attached(model), tokens_kept(cache, _loads(token_ids, 0)):
            _prefill(Decoder(model, cache), cache, token_ids, cache.config.prefill_chunk, progress)


def _decode(
    model: Any,
    input_ids: Tensor,
    config: SpeCacheConfig | None,
    streamer: Any,
    progress: Progress | None,
    *,
    past_key_values: Any = None,
    **arguments: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Prefill and decode in PyTorch's plain modes, as the only call that uses the cache that was given."""
    with modes.ours(), ExitStack() as stack:
        try:
            modes.check_process()
            if isinstance(past_key_values, SpeCache):
                stack.enter_context(past_key_values.in_use.by("generate"))
        except BaseException:
            if streamer is not None:
                streamer.end()
            raise
        return _decode_alone(model, input_ids, config, streamer, progress, past_key_values=past_key_values, **arguments)


def _decode_alone(
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
    streamer_has_prompt: bool = False,
    **model_arguments: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    given = None
    finished = False
    cache: SpeCache | None = None
    try:
        check_generation_config(generation_config)
        check_model_arguments(model_arguments)
        given = user_cache(past_key_values)
        token_ids = prompts(input_ids, attention_mask)
        cache = _cache_for(model, config, given)
        token_ids = _whole_sequences(cache, token_ids, input_ids, attention_mask, generation_config)
        check_prompt_lengths(token_ids, cache.info)
        chunk = generation_config.prefill_chunk_size or cache.config.prefill_chunk
        stored_new_tokens = _stored_new_tokens(generation_config, input_ids)
        check_room(cache, token_ids, stored_new_tokens, chunk)
        if streamer is not None and not streamer_has_prompt:
            with modes.callers():
                streamer.put(input_ids.cpu())
        request = token_choice(logits_processor, stopping_criteria, generation_config)
        batch = no_answers_yet(input_ids, request)
        with attached(model), tokens_kept(cache, _loads(token_ids, stored_new_tokens), batch.new_token_ids):
            _run(Decoder(model, cache), cache, token_ids, batch, request, chunk, streamer, progress)
        finished = True
    finally:
        if streamer is not None:
            with modes.callers():
                streamer.end()
        keep = given is not None or (finished and generation_config.return_dict_in_generate)
        if cache is not None and not keep:
            cache.close()
    if not generation_config.return_dict_in_generate:
        return batch.input_ids
    return GenerateDecoderOnlyOutput(
        sequences=batch.input_ids,
        scores=tuple(batch.scores) if request.record_scores else None,
        logits=tuple(batch.logits) if request.record_logits else None,
        past_key_values=cache,
    )


def _run(
    decoder: Decoder,
    cache: SpeCache,
    token_ids: list[list[int]],
    batch: Answers,
    request: TokenChoice,
    chunk: int,
    streamer: Any,
    progress: Progress | None,
) -> None:
    """Prefill, pre-decode, decode."""
    try:
        logits = _prefill(decoder, cache, token_ids, chunk, progress)  # [B, V]
        cache.counters.first_token_s = cache.counters.prefill_s
        with modes.callers():
            take_tokens(batch, logits, request, cache, streamer)
        guesses = _first_guesses(decoder, cache, batch, request)
        while active := batch.active:
            tokens = batch.input_ids[active, -1].tolist()
            step = decoder.step(active, tokens, [guesses[i] for i in active] if guesses else None)
            logits[active] = step.real
            context = with_guesses(batch, guesses) if guesses else None
            with modes.callers():
                take_tokens(batch, logits, request, cache, streamer)
                if guesses is not None and context is not None:
                    count_guesses(cache, batch, guesses, active)
                    guesses = guess(request, context, logits, step.guess, active)
    except BaseException as error:
        for index in batch.unfinished.nonzero()[:, 0].tolist():
            if len(cache.sequences) > index:
                cache.sequences[index].finish_reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
        raise
    finally:
        cache.settle()


def _prefill(decoder: Decoder, cache: SpeCache, token_ids: list[list[int]], chunk: int, progress: Progress | None) -> Tensor:
    """Prefill every sequence, equal ones once -> logits [B, V] of their last tokens."""
    first: dict[tuple[int, ...], int] = {}
    fresh = not cache.sequences
    cache.expected_sequences = len(token_ids)
    total = sum(len(ids) for ids in token_ids)
    done = 0
    logits: list[Tensor] = []
    try:
        for index, ids in enumerate(token_ids):
            twin = first.setdefault(tuple(ids), index)
            if fresh:
                cache.sequences.append(cache.repeat(twin) if twin != index else cache.new_sequence())
            if fresh and twin != index:
                cache.sequences[index].prepare_decode()
                logits.append(logits[twin])
            else:
                report = _offset_progress(progress, done, total)
                logits.append(decoder.prefill(cache.sequences[index], ids, chunk, report))
            done += len(ids)
    except BaseException:
        if fresh:
            for sequence in cache.sequences:
                sequence.clear()
            cache.sequences.clear()
        raise
    return torch.stack(logits)


def _offset_progress(progress: Progress | None, offset: int, total: int) -> Progress:
    if progress is None:
        return lambda done, of: None

    def report(done: int, of: int) -> None:
        with modes.callers():
            progress(offset + done, total)

    return report


def _first_guesses(decoder: Decoder, cache: SpeCache, batch: Answers, request: TokenChoice) -> list[int] | None:
    """Pre-decoding (Algorithm 2), where the policy guesses: one guess per sequence, finished ones included."""
    active = batch.active
    if not cache.config.policy.guesses or not active:
        return None
    logits = decoder.pre_decode(active, batch.input_ids[active, -1].tolist())
    with modes.callers():
        return guess(request, batch.input_ids, logits.new_zeros(len(batch.unfinished), logits.shape[-1]), logits, active)


def _loads(token_ids: list[list[int]], new_tokens: int) -> list[SequenceLoad]:
    """The batch as a plan sees it, read from the beginning."""
    return [SequenceLoad(len(ids), new_tokens) for ids in token_ids]


def _cache_for(model: Any, config: SpeCacheConfig | None, given: SpeCache | None) -> SpeCache:
    if given is None:
        return SpeCache(model, config)
    given.check_model(model)
    if config is not None and config.resolved(given.info.device.type) != given.config:
        raise UsageError("A SpeCache keeps the config it was made with. Leave config out, or start a new SpeCache(model, config).")
    return given


def _whole_sequences(
    cache: SpeCache, token_ids: list[list[int]], input_ids: Tensor, attention_mask: Tensor | None, generation_config: Any
) -> list[list[int]]:
    """Every sequence from its first token on, for a cache that may hold a part of it already."""
    stored = cache.sequences
    if not stored:
        return token_ids
    check_sequences(cache, token_ids)
    if len(token_ids) % len(stored):
        raise UsageError(f"The SpeCache holds {len(stored)} sequences but the batch has {len(token_ids)} prompts.")
    repeats = len(token_ids) // len(stored)
    if repeats > 1:  # num_return_sequences
        cache.sequences = [
            s for sequence in stored for s in [sequence, *(sequence.fork(cache.context) for _ in range(repeats - 1))]
        ]
    width = attention_mask.shape[1] if attention_mask is not None else getattr(generation_config, "_mask_length", 0)
    if width > input_ids.shape[1]:  # only what is new was passed
        return [sequence.token_ids + ids for sequence, ids in zip(cache.sequences, token_ids, strict=True)]
    return token_ids


def _stored_new_tokens(generation_config: Any, input_ids: Tensor) -> int:
    """Most tokens that decoding stores per sequence: all new ones but the last, which nothing follows."""
    new = (generation_config.max_length or 0) - input_ids.shape[1]
    return max(0, new - 1)
