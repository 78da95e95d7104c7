"""Part 2: every Triton kernel against PyTorch on this GPU, how long they take to compile, and the
tests marked `cuda`.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from specache.bench import kernel_backends
from specache.bench.gpu_check import pytest_report
from specache.bench.gpu_check.checks import FAILED, Check, PartRun, on_gpu
from specache.bench.gpu_check.memory_part import named_shape
from specache.bench.gpu_check.process import python, run_limited
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
ON_CPU = ("tests/kernels/triton/test_mapped_rows.py", "tests/kernels/triton/test_hot_rows.py")
ON_CPU_CHOSEN = "mapped or more_positions"
RESTARTS = 5  # of pytest, after a crash


def run(part: PartRun) -> None:
    for code, bits, dtype, queries in VARIANTS:
        name = f"one layer, {code}, {bits} bits, {str(dtype).removeprefix('torch.')}, {queries} queries"
        part.run(name, partial(_layer, part, code=code, bits=bits, dtype=dtype, queries=queries), needs_s=2)
    _tests(part)
    if on_gpu(part):
        part.run("registers and shared memory", lambda check: _resources(part, check), needs_s=20)


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


def _tests(part: PartRun) -> None:
    """Run the tests marked `cuda`, each as a check of its own."""
    if part.tree is None:
        part.run("pytest -m cuda", lambda check: check.skip("the tests are in the source tree, which is not here"))
        return
    files = cuda_tests(part.tree) if on_gpu(part) else list(ON_CPU)
    arguments = ["-m", "cuda"] if on_gpu(part) else ["-k", ON_CPU_CHOSEN]
    results = run_tests(part, files, arguments, 0.6 if on_gpu(part) else 1.0)
    for one in results:
        part.run(f"test {one['id']}", partial(_told, found=one))
    part.run("pytest ran every test", lambda check: check.require(results, "no test ran: see the log"))


def cuda_tests(tree: Path) -> list[str]:
    """Return the test files that have tests marked `cuda`."""
    marked = [path for path in sorted((tree / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text(encoding="utf-8")]
    return [str(path.relative_to(tree)) for path in marked if path.parts[-2] != "bench"]


def run_tests(part: PartRun, files: list[str], arguments: list[str], share: float) -> list[dict[str, Any]]:
    """Run pytest, again after a crash without what was run -> one result per test.

    Args:
        share: of the part's time that is left.
    """
    assert part.tree is not None
    report, ends = part.work / "tests.jsonl", time.monotonic() + share * (part.seconds_left - 3)
    report.unlink(missing_ok=True)
    command = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "specache.bench.gpu_check.pytest_report"),
        *(*arguments, "--rootdir", str(part.tree), *(str(part.tree / file) for file in files)),
    )
    where = {**os.environ, "SPECACHE_TEST_REPORT": str(report)}
    if not on_gpu(part):
        where["TRITON_INTERPRET"] = "1"
    for _ in range(RESTARTS):
        left = ends - time.monotonic()
        ended = run_limited(command, where, part.work / "tests.log", max(1.0, left), folder=part.work)
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        done = {line["id"] for line in lines if "outcome" in line}
        crashed = [line["id"] for line in lines if "outcome" not in line and line["id"] not in done]
        if not crashed and ended.exit_code == pytest_report.LOST:
            continue
        if not crashed:
            break
        with report.open("a") as file:  # the next run leaves it out
            reason = f"while it ran: {ended.reason() or 'pytest ended'}"
            file.write(json.dumps({"id": crashed[-1], "outcome": FAILED, "seconds": 0.0, "message": reason}) + "\n")
        if ended.timed_out:
            break
    log = part.work / "tests.log"
    print(log.read_text(errors="replace")[-6000:] if log.exists() else "", flush=True)
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    return [line for line in lines if "outcome" in line]


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
