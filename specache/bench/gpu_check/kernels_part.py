"""Part 2: every Triton kernel against PyTorch on this GPU, how long they take to compile, and the
tests marked `cuda`.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from specache.bench import kernel_backends
from specache.bench.gpu_check.checks import FAILED, Check, PartRun, on_gpu
from specache.bench.gpu_check.marked_tests import cuda_tests, run_tests
from specache.bench.gpu_check.memory_part import named_shape
from specache.bench.gpu_check.states import SKIPPED
from specache.bench.one_layer import LowBitLayer
from specache.bench.static_layer import StaticLayer
from specache.bench.synthetic import synthetic_rows
from specache.config import Code

BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # largest difference over the largest output
VARIANTS = (
    (Code.ROTATED, 2, torch.bfloat16, 2),
    (Code.KIVI, 2, torch.bfloat16, 2),
    (Code.KIVI, 1, torch.bfloat16, 1),
    (Code.ROTATED, 1, torch.float32, 2),
    (Code.ROTATED, 4, torch.float16, 2),
)  # fmt: skip -- code, bits, rows' dtype, queries
BATCH = 8
ON_CPU = "tests/kernels/triton/test_mapped_rows.py"  # the cheapest that are collected for Triton's interpreter alone
PROCESSES = 8  # that share the tests, and the GPU
RESERVED_S = 22.0  # for what follows the tests


def run(part: PartRun) -> None:
    """Compare layers here, while the tests run in other processes: compiling takes longest."""
    with ThreadPoolExecutor(1) as pool:
        tests = pool.submit(_run_tests, part) if part.tree is not None else None
        try:
            for code, bits, dtype, queries in VARIANTS:
                name = f"one layer, {code}, {bits} bits, {str(dtype).removeprefix('torch.')}, {queries} queries"
                part.run(name, partial(_layer, part, code=code, bits=bits, dtype=dtype, queries=queries), needs_s=2)
        finally:  # also where this process has lost the GPU
            _report_tests(part, None if tests is None else tests.result())
    if on_gpu(part):
        part.run("registers and shared memory", lambda check: _resources(part, check), needs_s=15)


def _report_tests(part: PartRun, results: list[dict[str, Any]] | None) -> None:
    """Make a check of every test."""
    if results is None:
        part.run("pytest -m cuda", lambda check: check.skip("the tests are in the source tree, which is not here"))
        return
    for one in results:
        part.run(f"test {one['id']}", partial(_told, found=one))
    part.run("pytest ran the tests", lambda check: check.require(results, "no test ran: see the log"))


def _run_tests(part: PartRun) -> list[dict[str, Any]]:
    """Run the tests marked `cuda`; without a GPU a file of those in Triton's interpreter."""
    if not on_gpu(part):
        return run_tests(part, [ON_CPU], [], 1, part.seconds_left - 5, {"TRITON_INTERPRET": "1"})
    assert part.tree is not None
    processes = max(1, min(PROCESSES, (os.cpu_count() or 2) // 2))
    return run_tests(part, cuda_tests(part.tree), ["-m", "cuda"], processes, part.seconds_left - RESERVED_S)


@torch.no_grad()
def _layer(part: PartRun, check: Check, code: Code, bits: int, dtype: torch.dtype, queries: int) -> None:
    """Compare a static step of eight sequences, launched, captured and replayed, with PyTorch's."""
    shape = named_shape(part.sizes.layer)
    context = 4160 if on_gpu(part) else 192  # odd against blocks and splits
    keys, values = synthetic_rows(shape.kv_heads, context, shape.head_dim, dtype, 0, part.device)
    query = torch.randn(BATCH, shape.query_heads, queries, shape.head_dim, generator=torch.Generator().manual_seed(1))
    query = query.to(part.device, dtype)
    with kernel_backends.using(kernel_backends.PLAIN):
        expected = LowBitLayer(keys, values, code, bits, 64, batch=BATCH).attend(query)
    static = StaticLayer(LowBitLayer(keys, values, code, bits, 64, batch=BATCH), queries, dtype)
    seconds = []
    for step in range(3):  # launched, captured, replayed
        started = time.perf_counter()
        found = static.attend(query)
        if on_gpu(part):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        real = found[:, :, :1].float()  # the draft row lacks pairs that were not fetched before
        difference = float((real - expected[:, :, :1].float()).abs().max() / expected.abs().max())
        check.require(torch.isfinite(real).all(), f"step {step} is not finite")
        check.require(difference <= BOUNDS[dtype], f"step {step} is off by {difference:.1e} of the largest output")
        check.details["difference"] = max(difference, check.details.get("difference", 0.0))
    check.details |= {"compile_s": round(seconds[0], 2), "capture_s": round(seconds[1], 2), "replay_ms": round(seconds[2] * 1e3, 2)}
    part.table("compile times, seconds", [{"variant": check.name, "first step": seconds[0], "capture": seconds[1]}])


def _told(check: Check, found: dict[str, Any]) -> None:
    check.details["test_s"] = found["seconds"]
    if found["outcome"] == SKIPPED:
        check.skip(found["message"])
    check.require(found["outcome"] != FAILED, found["message"] or "failed")


def _resources(part: PartRun, check: Check) -> None:
    """Compile the hardest variants for this GPU: none may spill or take too much shared memory."""
    from specache.kernels.triton import ahead_of_time

    major, minor = torch.cuda.get_device_capability()
    target = 10 * major + minor
    if target not in ahead_of_time.SHARED_MEMORY_KIB:
        check.skip(f"the table has no limits of sm_{target}")
    started = time.monotonic()
    found = ahead_of_time.compile_all(ahead_of_time.quick_variants(), [target], min(12, os.cpu_count() or 1))
    check.details |= {"kernels": len(found), "seconds": round(time.monotonic() - started, 1)}
    wrong = ahead_of_time.problems(found)
    check.require(not wrong, "; ".join(wrong[:3]))
