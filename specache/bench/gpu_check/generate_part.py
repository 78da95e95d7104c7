"""Part 3: a GPU generates what the CPU does, under every policy, alone and in changing company."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import specache
from specache.bench.compute_device import CUDA
from specache.bench.gpu_check.check_sizes import TINY
from specache.bench.gpu_check.checks import Check, PartRun
from specache.bench.gpu_check.seeded_answers import NEAR_TIE, answer, ragged_prompts, relative_error, require_same, seeded_model
from specache.bench.gpu_check.simulation import SLOWER, as_on_a_gpu, exactly
from specache.bench.shapes import SHAPES, Shape
from specache.config import Code, Policy, SpeCacheConfig
from specache.device.static_sizes import KINDS
from specache.engine.attention_hook import attached

LAYERS = 8  # of the shape: deeper random models amplify rounding until it decides tokens
STOCK_SHARE, STOCK_MORE = 3.0, 5e-3  # times the error of stock attention in bfloat16, and more, that ours may have
FIRST_BOUND, FP32_BOUND = 1e-3, 2e-2  # relative error of a float32 model's logits: of the first two tokens, of all
LEAST = 4  # tokens that must be the same before a tie may be decided otherwise


def run(part: PartRun) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    shape = SHAPES.get(part.sizes.generate, TINY)
    shape = replace(shape, layers=min(shape.layers, LAYERS))
    model = seeded_model(shape)
    there = copy.deepcopy(model).to(part.device)
    pair = _Pair(part, shape, model, there)
    for policy in sorted(KINDS, key=lambda one: one is not Policy.VERIFIED):
        for graph in (True, False):
            name = f"float32 tokens, {policy}, {'as graphs' if graph else 'launch by launch'}"
            part.run(name, partial(pair.same_tokens, policy=policy, graph=graph), needs_s=2)
    part.run("float32 tokens, full", lambda check: pair.same_tokens(check, Policy.FULL, False), needs_s=2)
    part.run(
        "float32 tokens, verified, KIVI's code at 1 bit",
        lambda check: pair.same_tokens(check, Policy.VERIFIED, True, code=Code.KIVI, bits=1, top_k=32),
        needs_s=2,
    )
    part.run("bfloat16 logits", lambda check: _bfloat16_logits(part, shape, check), needs_s=5)
    part.run("sequences join and leave", lambda check: _joining(part, check), needs_s=10)


class _Pair:
    """One model twice: on the CPU as the reference, and on the device."""

    def __init__(self, part: PartRun, shape: Shape, model: Any, there: Any) -> None:
        self._part, self._model, self._there = part, model, there
        self._ids, self._mask = ragged_prompts(part.sizes.prompts, shape.vocabulary)
        self._expected: dict[Any, Any] = {}

    def same_tokens(self, check: Check, policy: Policy, graph: bool, **changes: Any) -> None:
        key = policy, tuple(sorted(changes.items()))
        new, width = self._part.sizes.new_tokens, self._ids.shape[1]
        if key not in self._expected:
            with exactly():
                self._expected[key] = answer(self._model, self._ids, self._mask, settings(self._part, policy, **changes), new)
        with as_on_a_gpu(self._part) as steps:
            config = settings(self._part, policy, cuda_graph=graph if policy in KINDS else None, **changes)
            found = answer(self._there, self._ids, self._mask, config, new)
        require_same(check, found, self._expected[key], width, LEAST)
        for bound, name in ((FIRST_BOUND, "first_error"), (FP32_BOUND, "logit_error")):
            check.require(check.details[name] < bound, f"{name}: logits are off by {check.details[name]:.1e}, at most {bound:.0e}")
        if policy in KINDS:
            require_fast_path(check)
            check.details |= {"captures": steps.captures, "replays": steps.replays}
            check.require(bool(steps.replays) == (graph and _has_graphs(self._part)), f"{steps.replays} steps were replayed")


def settings(part: PartRun, policy: Policy, **changes: Any) -> SpeCacheConfig:
    """Return the settings of an answer: groups are quantised on the way, and pairs are fetched."""
    group = 64 if part.device == CUDA else 16
    fixed = {"slow_tier": "ram", "policy": policy, "group_size": group, "residual": group, "top_k": 32 if group == 64 else 8}
    if policy is Policy.FULL:
        return SpeCacheConfig(policy=policy)
    return SpeCacheConfig(**{**fixed, "prefill_chunk": 256, **changes})


def require_fast_path(check: Check) -> None:
    """Fail the check if a warning says that something slower ran instead."""
    slower = [text for text in check.messages() if any(sign in text for sign in SLOWER)]
    check.require(not slower, f"something slower ran: {slower[:1]}")


def _has_graphs(part: PartRun) -> bool:
    return part.device == CUDA or part.tree is not None


def _bfloat16_logits(part: PartRun, shape: Shape, check: Check) -> None:
    """Teacher-forced: the same tokens in float32 on the CPU and in bfloat16 on the device.

    The model's attention is about flat, so that its own rounding, which stock attention shows, is
    small.
    """
    ids, _ = ragged_prompts(part.sizes.prompts[:1], shape.vocabulary)
    model = seeded_model(shape, spread=None)
    given = torch.randint(2, shape.vocabulary, (part.sizes.new_tokens,), generator=torch.Generator().manual_seed(5)).tolist()
    text = torch.cat([ids, torch.tensor([given])], dim=1)
    there = copy.deepcopy(model).to(part.device, torch.bfloat16)
    stock = relative_error(_stock_logits(there, text, len(given)), _stock_logits(model, text, len(given)))
    bound = STOCK_SHARE * stock + STOCK_MORE
    check.details |= {"error_stock": stock, "bound": bound}
    for policy in (Policy.VERIFIED, Policy.NONE):
        with exactly():
            expected = forced_logits(model, ids, given, settings(part, policy))
        with as_on_a_gpu(part):
            found = forced_logits(there, ids, given, settings(part, policy))
        error = relative_error(found, expected)
        check.details[f"error_{policy}"] = error
        check.require(error <= bound, f"{policy}: bfloat16 logits are off by {error:.1e}, those of stock attention by {stock:.1e}")
    require_fast_path(check)


@torch.no_grad()
def _stock_logits(model: Any, text: torch.Tensor, last: int) -> torch.Tensor:
    """Return the stock model's float32 logits [last, V] after the last tokens of a text [1, S]."""
    logits: torch.Tensor = model(text.to(next(model.parameters()).device), use_cache=False, logits_to_keep=last).logits[0]
    return logits.float().cpu()


@torch.no_grad()
def forced_logits(model: Any, ids: torch.Tensor, given: list[int], config: SpeCacheConfig) -> torch.Tensor:
    """Return the float32 logits [steps, V] after each of the given tokens."""
    device, found = next(model.parameters()).device, []
    with specache.SpeCache(model, config) as cache:
        specache.prefill(model, ids.to(device), cache=cache)
        engine = specache.Engine.over(model, cache)
        with attached(model):
            run = engine.resume(list(cache.sequences), given[:1])
            for token in given:
                run.give([token], cache.counters)
                engine.step()
                assert run.logits is not None
                found.append(run.logits[0].float().cpu())
    return torch.stack(found)


def _joining(part: PartRun, check: Check) -> None:
    """Sequences of different lengths join and leave the batch of an engine, on both devices."""
    shape, count = part.sizes.joining, part.sizes.joined
    model = seeded_model(shape)
    with exactly():
        expected = _joined_tokens(part, model, count)
    with as_on_a_gpu(part) as steps:
        found = _joined_tokens(part, copy.deepcopy(model).to(part.device), count)
    same = 0
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        check.require(len(ours) == len(theirs), f"sequence {number} has {len(ours)} tokens, expected {len(theirs)}")
        step = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
        same += step
        if step < len(ours):
            _require_tie(part, check, model, number, step, theirs)
    check.details |= {"sequences": count, "tokens": sum(map(len, expected)), "same_tokens": same, "captures": steps.captures}
    check.require(same >= 0.9 * sum(map(len, expected)), f"only {same} tokens are the same")
    require_fast_path(check)


def _joined_tokens(part: PartRun, model: Any, count: int) -> list[list[int]]:
    """Return the new tokens of every sequence."""
    engine = specache.Engine(model, settings(part, Policy.VERIFIED))
    handles: list[Any] = []
    steps = 0
    every = max(2, part.sizes.joined_tokens // 12)
    more = True
    while more or len(handles) < count:
        if len(handles) < count and (steps % every == 0 or not more):
            ids, new = _request(part, len(handles))
            handles.append(engine.add(specache.make_request(model, ids.to(next(model.parameters()).device), max_new_tokens=new)))
        more = engine.step()
        steps += 1
    tokens = [handle.result() for handle in handles]
    engine.close()
    return [_new_tokens(one, _request(part, i)[0].shape[1]) for i, one in enumerate(tokens)]


def _request(part: PartRun, number: int) -> tuple[torch.Tensor, int]:
    """Return prompt [1, S] and new tokens of a sequence; together they are `joined_tokens` each."""
    least = 150 if part.device == CUDA else 40
    ids, _ = ragged_prompts((least + 37 * number % 200,), part.sizes.joining.vocabulary, seed=100 + number)
    longer = part.sizes.joined_tokens // 5 * (1 if number % 2 else -1)
    return ids, part.sizes.joined_tokens + longer


def _new_tokens(result: Any, width: int) -> list[int]:
    sequences = result.sequences if hasattr(result, "sequences") else result
    return [int(token) for token in torch.as_tensor(sequences).reshape(-1)[width:]]


def _require_tie(part: PartRun, check: Check, model: Any, number: int, step: int, expected: list[int]) -> None:
    """Require that rounding decided the first token that differs."""
    check.require(step, f"sequence {number} begins with another token")
    ids, _ = _request(part, number)
    with warnings.catch_warnings(), exactly():
        warnings.simplefilter("ignore")
        logits = forced_logits(model, ids, expected[:step], settings(part, Policy.VERIFIED))[-1]
    best = logits.topk(2).values
    gap = float((best[0] - best[1]) / logits.abs().max())
    check.require(gap < NEAR_TIE, f"sequence {number} differs at token {step}, where the two best logits are {gap:.1e} apart")
    check.details["near_ties"] = check.details.get("near_ties", 0) + 1
