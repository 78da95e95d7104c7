"""The Triton kernels: in the interpreter (in a process of its own), compiled ahead of time, chosen and refused, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specache.config import Code
from specache.errors import ConfigError
from specache.kernels import dispatch
from specache.kernels import triton as triton_kernels
from specache.kernels.torch import operations as torch_ops
from specache.low_bit.layout import PageLayout
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from tests.kernels.test_native import Case

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def without_interpreter():
    """The environment in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != triton_kernels.INTERPRETER}


@needs_triton
@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "tests/kernels/triton").glob("test_*.py")))
def test_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/kernels/triton" / file)]
    environment = {**os.environ, triton_kernels.INTERPRETER: "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_triton
def test_every_kernel_compiles_for_every_target_without_spills():
    """The hardest variants of `ahead_of_time.quick_variants`; the whole table is in docs/gpu_kernels.md."""
    command = [sys.executable, "-m", "specache.kernels.triton.ahead_of_time", "--quick"]
    result = subprocess.run(command, cwd=ROOT, env=without_interpreter(), capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_triton
def test_spills_are_seen():
    code = (
        "from specache.config import Code\n"
        "from specache.kernels.triton import ahead_of_time\n"
        "from specache.kernels.triton.launch_options import Shape\n"
        "variant = ahead_of_time.Variant('attend', Shape(Code.KIVI, 2, 64, 128, 8, 2), 'bf16')\n"
        "found = {(variant, 80): ahead_of_time.compile_variant(variant, 80, maxnreg=64)}\n"
        "assert ahead_of_time.problems(found), found\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=without_interpreter(), check=True)


def test_importing_specache_imports_no_triton():
    code = "import sys, specache, specache.kernels.dispatch; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_on_the_cpu_says_how():
    if triton_kernels.missing() is None:
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"), dispatch.using("triton"):
        pass


@pytest.mark.parametrize(("found", "said"), [(None, "specache[gpu]"), (object(), "compute capability 7.5")])
def test_what_is_missing_is_named(monkeypatch, found, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    reason = triton_kernels.missing()
    assert reason is not None
    assert said in reason


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize(("bits", "group_size", "dim"), [(1, 64, 80), (2, 64, 128), (2, 32, 256), (4, 16, 96)])
def test_on_a_gpu_they_equal_torch(code, bits, group_size, dim, dtype):
    case = Case(code, bits, group_size, dim, 2, 4, 2, [2048 // group_size, 0, 640 // group_size], 1, dtype)
    backend, device = triton_kernels.load(), torch.device("cuda")
    copies = []
    for keys, values, copy in zip(case.keys, case.values, case.copies, strict=True):
        copies.append(on_device(case, keys, values, copy, backend, device))
    query, rest = case.query.to(device, dtype), case.rest.to(device)
    scores = backend.score(query, copies, case.lengths, 0.2, 30.0)
    expected = torch_ops.score(query, copies, case.lengths, 0.2, 30.0)
    finite = expected != -torch.inf
    assert (scores - expected)[finite].abs().max() <= 1e-4 * expected[finite].abs().max()
    positions = backend.select(expected, rest, case.lengths, 64)
    wanted = torch_ops.select(expected, rest, case.lengths, 64)
    assert (positions == wanted).float().mean() > 0.99  # two exponentials order near equals differently
    stored = [torch.cat([k, v], dim=-1).pin_memory() for k, v in zip(case.keys, case.values, strict=True)]
    rows = backend.gather(stored, positions)
    backend.rescore(query, expected, positions, rows, 0.2, 30.0)
    out, lse = backend.attend(expected.clone(), positions, rows, copies, case.lengths)
    expected_out, expected_lse = torch_ops.attend(expected, positions, rows, copies, case.lengths)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out, expected_out, rtol=1e-3, atol=1e-3)


def on_device(case, keys, values, copy, backend, device):
    """A copy that Triton quantised on the GPU; its codes are those of the CPU's."""
    table = PageTable(PagePool(PageLayout(case.code, case.bits, case.group_size, case.heads, case.dim), device, ByteBudget()))
    weights = case.weights.to(device) if case.code is Code.ROTATED else None
    if copy.length:
        table.extend(copy.length)
        backend.quantise(keys.to(device), values.to(device), table.copy(weights), 0)
        for ours, theirs in zip(torch_ops.dequantise(table.copy(weights)), torch_ops.dequantise(copy), strict=True):
            differs = ((ours.cpu() - theirs).abs() > 1e-3 * theirs.abs().max()).any(-1)
            assert differs.float().mean() <= 0.02
    return table.copy(weights)
