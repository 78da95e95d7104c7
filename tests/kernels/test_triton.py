"""The Triton kernels: in the interpreter (in a process of its own), compiled ahead of time, chosen
and refused, and on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specache.config import Code, TopK
from specache.errors import ConfigError
from specache.kernels import dispatch
from specache.kernels import triton as triton_kernels
from specache.kernels.torch import operations as torch_ops
from specache.low_bit.layout import PageLayout
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from tests.kernels.paged import OUT_ERROR, PagedCase, assert_near, assert_rounded, assert_selected
from tests.kernels.test_native import Case
from tests.proofs import ROOT, Proof

INTERPRETED = "tests/kernels/triton"
COMPILED = ("specache/config.py", "specache/kernels", "specache/low_bit")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def without_interpreter():
    """The environment in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != triton_kernels.INTERPRETER}


def in_the_interpreter(file: str) -> Proof:
    paths = [*COMPILED, "specache/device", "tests/device", "tests/kernels/paged.py", "tests/kernels/recent_case.py"]
    name = f"interpreter-{Path(file).stem.removeprefix('test_')}"
    return Proof(name, [*paths, f"{INTERPRETED}/{file}"], ["torch", "triton"])


def compiled() -> Proof:
    return Proof("ahead-of-time", [*COMPILED, "tests/kernels/triton_front_end.py"], ["torch", "triton"])


@needs_triton
@pytest.mark.timeout(1800)  # the interpreter takes minutes, on a busy machine many
@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / INTERPRETED).glob("test_*.py")))
def test_kernels_equal_pytorchs_in_the_interpreter(file):
    in_the_interpreter(file).skip_if_known()
    run_in_the_interpreter(file)


@needs_triton
@pytest.mark.thorough
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / INTERPRETED).glob("test_*.py")))
def test_kernels_equal_pytorchs_in_every_combination(file):
    run_in_the_interpreter(file, "-m", "thorough or not thorough")
    in_the_interpreter(file).write()


def run_in_the_interpreter(file: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "1800", f"{INTERPRETED}/{file}"]
    environment = {**os.environ, triton_kernels.INTERPRETER: "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_triton
def test_every_kernel_compiles_for_every_target():
    compiled().skip_if_known()
    compile_every_kernel()


@needs_triton
@pytest.mark.thorough
def test_every_kernel_compiles_for_every_target_again():
    compile_every_kernel()
    compiled().write()


def compile_every_kernel() -> None:
    """Without spills, in the hardest variants of `ahead_of_time.quick_variants` (the whole table is
    in docs/gpu_kernels.md); and where an integer argument is 1 (one KV head, say), which a launch
    makes a constant, and the interpreter does not.
    """
    for module in ("specache.kernels.triton.ahead_of_time --quick", "tests.kernels.triton_front_end"):
        command = [sys.executable, "-m", *module.split()]
        result = subprocess.run(command, cwd=ROOT, env=without_interpreter(), capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


@needs_triton
def test_register_spills_are_reported():
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


def test_triton_on_the_cpu_is_refused_with_the_way_to_enable_it():
    if triton_kernels.unsupported_reason() is None:
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"), dispatch.using("triton"):
        pass


@pytest.mark.parametrize(("found", "said"), [(None, "specache[gpu]"), (object(), "compute capability 7.5")])
def test_a_missing_requirement_is_named(monkeypatch, found, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    reason = triton_kernels.unsupported_reason()
    assert reason is not None
    assert said in reason


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize(("bits", "group_size", "dim"), [(1, 64, 80), (2, 64, 128), (2, 32, 256), (4, 16, 96)])
def test_kernels_equal_pytorchs_on_a_gpu(code, bits, group_size, dim, dtype):
    case = Case(code, bits, group_size, dim, 2, 4, 2, [2048 // group_size, 0, 640 // group_size], 1, dtype)
    check_against_pytorch(case, dtype, torch.device("cuda"))


def check_against_pytorch(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Every kernel of a step, over a copy that was quantised on the device."""
    kernels, exact = triton_kernels.load(), dtype == torch.float32
    copies = zip(case.keys, case.values, case.low_bit_kvs, strict=True)
    paged = PagedCase(case, dtype, [on_device(case, *one, kernels, device) for one in copies], device)
    lengths = paged.tables.lengths
    scores, expected = paged.score(kernels, 30.0), paged.torch_scores(30.0)
    if exact:
        assert_near(scores.values, expected, 1e-4)
    else:
        assert_rounded(scores, lengths, expected)
    positions = kernels.select_pages(scores, paged.rest, lengths, TopK.always(64))
    if exact:
        wanted = torch_ops.select(expected, paged.rest, case.lengths, TopK.always(64))
        assert (positions == wanted).float().mean() > 0.99  # two exponentials order near equals differently
    else:
        assert_selected(positions, expected, paged.rest, case.lengths, TopK.always(64))
    stored = [torch.cat([k, v], dim=-1) for k, v in zip(case.keys, case.values, strict=True)]
    longest = max(case.lengths)
    stored = [torch.nn.functional.pad(rows, (0, 0, 0, longest - rows.shape[1])) for rows in stored]  # with equal strides
    if device.type == "cuda":
        stored = [rows.pin_memory() for rows in stored]
    addresses = torch.tensor([rows.data_ptr() for rows in stored], device=device)
    rows = kernels.gather_at(addresses, stored[0], positions.flatten(2)).unflatten(2, positions.shape[2:])
    kernels.rescore_pages(paged.query, scores, positions, rows, 0.2, 30.0)
    torch_ops.rescore(paged.query, expected, positions, rows, 0.2, 30.0)
    out, lse = paged.attend(kernels, scores, positions, rows)
    expected_out, expected_lse = paged.torch_attend(expected, positions, rows)
    if exact:
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(out, expected_out, rtol=1e-3, atol=1e-3)
    else:
        assert_near(lse, expected_lse, 1e-3)
        assert_near(out, expected_out, OUT_ERROR, paged.largest(rows))


def on_device(case, keys, values, low_bit_kv, backend, device):
    """A copy that Triton quantised on the GPU; its codes are those of the CPU's."""
    table = PageTable(PagePool(PageLayout(case.code, case.bits, case.group_size, case.heads, case.dim), device, ByteBudget()))
    weights = case.weights.to(device) if case.code is Code.ROTATED else None
    if low_bit_kv.length:
        table.extend(low_bit_kv.length)
        backend.quantise(keys.to(device), values.to(device), table.low_bit_kv(weights), 0)
        for ours, theirs in zip(torch_ops.dequantise(table.low_bit_kv(weights)), torch_ops.dequantise(low_bit_kv), strict=True):
            differs = ((ours.cpu() - theirs).abs() > 1e-3 * theirs.abs().max()).any(-1)
            assert differs.float().mean() <= 0.02
    return table.low_bit_kv(weights)
