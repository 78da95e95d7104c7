"""Part 4: planned bytes against allocated ones, and memory that runs out during an answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import specache
from specache.bench.compute_device import held_bytes, peak_bytes, release_memory, reset_peak
from specache.bench.contenders import SpeCacheContender
from specache.bench.gpu_check.check_sizes import TINY
from specache.bench.gpu_check.checks import Check, PartRun, on_gpu
from specache.bench.gpu_check.generate_part import settings
from specache.bench.gpu_check.seeded_answers import answer, ragged_prompts, seeded_model
from specache.bench.gpu_check.simulation import as_on_a_gpu
from specache.bench.published_shapes import NAMES, shape_of
from specache.bench.shapes import RandomModel, Shape
from specache.bench.workload import Workload
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import plan
from specache.planning.roofline.static_step import static_step_bytes

STEPS = 12
SLACK = 1.1  # allocated over planned: the allocator rounds, and libraries allocate inside operations
SLACK_BYTES = 150_000_000  # of cuBLAS and of kernels' own workspaces
FAILS_AT = 9  # step in which memory runs out
NEW = 24


def run(part: PartRun) -> None:
    part.run("planned and allocated, decoding", lambda check: _decoding(part, check), needs_s=4)
    part.run("planned and allocated, a prompt", lambda check: _prompt(part, check), needs_s=3)
    part.run("out of memory once, in a step", lambda check: _once(part, check), needs_s=3)
    part.run("out of memory for good, then continued", lambda check: _for_good(part, check), needs_s=3)
    if on_gpu(part):
        part.run("a GPU that is full while a batch grows", lambda check: _full_gpu(part, check), needs_s=5)


def named_shape(name: str) -> Shape:
    """Return a published shape, or the tiny one of a run on a CPU."""
    return shape_of(name) if name in NAMES else TINY


def _decoding(part: PartRun, check: Check) -> None:
    sizes, rows = part.sizes, []
    model = RandomModel(named_shape(sizes.memory), sizes.weights, 0, part.device).load()
    for policy in (Policy.VERIFIED, Policy.NONE):
        work = Workload(model, sizes.memory_batch, sizes.memory_context)
        config = SpeCacheConfig(policy=policy, slow_tier=SlowTierKind.RAM)
        contender = SpeCacheContender(work, config)
        release_memory()
        before = held_bytes(part.device)
        with as_on_a_gpu(part):
            contender.prepare()
            work.drop_rows()
            release_memory()
            reset_peak(part.device)
            with contender.ready():
                for _ in range(STEPS):
                    contender.step()
            if on_gpu(part):
                allocated = peak_bytes(part.device) - before
            else:
                allocated = int(contender.held.stats()["fast_memory_peak_bytes"])
            contender.close()
        sequences = [PlannedSequence(sizes.memory_context, STEPS)] * sizes.memory_batch
        planned = plan(work.dimensions, contender.config, sequences).decode.total
        planned += static_step_bytes(work.dimensions, contender.config, sizes.memory_context, sizes.memory_batch)
        rows.append(
            {"policy": str(policy), "context": sizes.memory_context, "batch": sizes.memory_batch, **_compared(planned, allocated)}
        )
    part.table("memory of a decode, bytes", rows)
    _require_within(check, rows)


def _prompt(part: PartRun, check: Check) -> None:
    sizes = part.sizes
    model = RandomModel(named_shape(sizes.memory), sizes.weights, 0, part.device).load()
    config = SpeCacheConfig(slow_tier=SlowTierKind.RAM).resolved(part.device)
    ids = torch.randint(
        2, named_shape(sizes.memory).vocabulary, (1, sizes.memory_prompt), generator=torch.Generator().manual_seed(0)
    )
    release_memory()
    before = held_bytes(part.device)
    reset_peak(part.device)
    with specache.SpeCache(model, config) as cache:
        specache.prefill(model, ids.to(part.device), cache=cache)
        allocated = peak_bytes(part.device) - before if on_gpu(part) else int(cache.stats()["fast_memory_peak_bytes"])
        dimensions = cache.resources.dimensions
    planned = plan(dimensions, config, [PlannedSequence(sizes.memory_prompt)]).prefill.total
    rows = [{"policy": "a prompt", "context": sizes.memory_prompt, "batch": 1, **_compared(planned, allocated)}]
    part.table("memory of a decode, bytes", rows)
    _require_within(check, rows)


def _compared(planned: int, allocated: int) -> dict[str, Any]:
    return {"planned": planned, "allocated": allocated, "ratio": allocated / planned}


def _require_within(check: Check, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        check.details[f"{row['policy']}_ratio"] = row["ratio"]
        most = row["planned"] * SLACK + SLACK_BYTES
        check.require(
            row["allocated"] <= most, f"{row['policy']}: {row['allocated']:,} bytes were allocated, {row['planned']:,} planned"
        )


class _Answers:
    """Answers of a small model, which may run out of memory."""

    def __init__(self, part: PartRun) -> None:
        shape = part.sizes.joining
        self.model = copy.deepcopy(seeded_model(shape)).to(part.device)
        self.ids, self.mask = ragged_prompts((150, 90), shape.vocabulary)
        self.config = settings(part, Policy.VERIFIED, cuda_graph=False)  # a graph calls no hook
        with as_on_a_gpu(part):
            self.expected = answer(self.model, self.ids, self.mask, self.config, NEW).sequences.cpu()

    def failing(self, fails: Callable[[int], bool]) -> Any:
        """Have the last layer raise PyTorch's error in the passes of one or two tokens for which
        `fails(number)`. Return the hook's handle.
        """
        passes = [0]

        def hook(module: Any, arguments: Any, keywords: Any) -> None:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            if hidden.shape[1] <= 2:
                passes[0] += 1
                if fails(passes[0]):
                    raise torch.OutOfMemoryError("CUDA out of memory (injected by the check)")

        return self.model.model.layers[-1].register_forward_pre_hook(hook, with_kwargs=True)


def _once(part: PartRun, check: Check) -> None:
    """The step is tried again without static buffers, and the tokens are the same."""
    answers = _Answers(part)
    handle = answers.failing(lambda number: number == FAILS_AT)
    try:
        with as_on_a_gpu(part):
            found = answer(answers.model, answers.ids, answers.mask, answers.config, NEW).sequences.cpu()
    finally:
        handle.remove()
    check.require(any("memory" in text.lower() for text in check.messages()), "no warning said that memory ran out")
    check.require(torch.equal(found, answers.expected), "the tokens differ from those of an undisturbed answer")


def _for_good(part: PartRun, check: Check) -> None:
    """The error has the tokens so far, and the cache goes on to the same answer."""
    answers = _Answers(part)
    width, expected = answers.ids.shape[1], answers.expected
    with as_on_a_gpu(part), specache.SpeCache(answers.model, answers.config) as cache:
        handle = answers.failing(lambda number: number >= FAILS_AT)
        try:
            answer(answers.model, answers.ids, answers.mask, None, NEW, past_key_values=cache)  # type: ignore[arg-type]
        except specache.OutOfMemoryError as error:
            kept = error.new_token_ids or []
        else:
            check.require(False, "no OutOfMemoryError was raised")
            return
        finally:
            handle.remove()
        _require_continues(check, answers, cache, kept, expected, width)


def _require_continues(check: Check, answers: Any, cache: Any, kept: list[list[int]], expected: torch.Tensor, width: int) -> None:
    """Require that the tokens before an error are right, and that the cache goes on from them."""
    count = min(map(len, kept), default=0)
    check.details["kept"] = count
    check.require(count >= 2, f"the error kept {kept}")
    so_far = torch.tensor(kept)
    check.require(torch.equal(so_far, expected[:, width : width + count]), "the tokens before the error differ")
    ids = torch.cat([answers.ids, so_far], dim=1)
    mask = torch.cat([answers.mask, torch.ones_like(so_far)], dim=1)
    found = answer(answers.model, ids, mask, None, expected.shape[1] - ids.shape[1], past_key_values=cache)  # type: ignore[arg-type]
    check.require(torch.equal(found.sequences.cpu(), expected), "the continued answer differs from an undisturbed one")


def _full_gpu(part: PartRun, check: Check) -> None:
    """All free memory is taken away while a batch decodes, just before its buffers must grow."""
    answers = _Answers(part)
    answers.ids, answers.mask = ragged_prompts((8192 - 2 * 64 - 40,), part.sizes.joining.vocabulary)
    answers.config = settings(part, Policy.VERIFIED)
    new, width = 120, answers.ids.shape[1]
    answers.expected = answer(answers.model, answers.ids, answers.mask, answers.config, new).sequences.cpu()
    release_memory()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    seen = [0]

    def take_all(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        if seen[0] == 20:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, torch.cuda.memory_reserved() / total))
        return scores

    with specache.SpeCache(answers.model, answers.config) as cache:
        try:
            found = answer(answers.model, answers.ids, answers.mask, None, new, past_key_values=cache, logits_processor=[take_all])  # type: ignore[arg-type]
        except specache.OutOfMemoryError as error:
            torch.cuda.set_per_process_memory_fraction(1.0)
            check.details["raised"] = True
            _require_continues(check, answers, cache, error.new_token_ids or [], answers.expected, width)
            return
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    check.details |= {"raised": False, "warnings": len(check.messages())}
    same = int((found.sequences.cpu() == answers.expected)[0, width:].int().cummin(0).values.sum())
    check.details["same_tokens"] = same
    check.require(same >= new // 2, f"only {same} of {new} tokens are those of an undisturbed answer")
