"""Missing components of a machine are named in one warning, and a fallback is used."""

from __future__ import annotations

import builtins
import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from specache.cli import diagnosis
from specache.config import Code
from specache.kernels import dispatch, gpu_quantise
from specache.kernels import triton as triton_kernels
from specache.kernels.torch import operations as torch_ops
from specache.platform import machine
from tests.cli.running import one_line, run
from tests.kernels.test_native import Case

GPU = torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Reasons are found once per process; here each test has its own machine."""
    for remembered in (triton_kernels.launch_failure, gpu_quantise._missing, gpu_quantise._warn_unsupported):
        remembered.cache_clear()
    gpu_quantise._build_failures.clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as PyTorch reports it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")


class OnGpu:
    """Keys and values, and their low-bit copy, of which the choice of a backend reads no more."""

    device, dtype = GPU, torch.float32
    head_dim, group_size, code = 64, 64, Code.ROTATED


class Kernels:
    """Triton's kernels without Triton. `quantise` notes its calls, and may fail.

    Args:
        destroys: a tensor that a kernel has overwritten when another one fails.
    """

    def __init__(self, error: Exception | None = None, destroys: torch.Tensor | None = None) -> None:
        self.error, self.destroys, self.calls = error, destroys, 0

    def unsupported_reason(self, dim: int, dtype: torch.dtype, group_size: int, code: Code) -> None:
        return None

    def quantise(self, *arguments: Any) -> None:
        self.calls += 1
        if self.destroys is not None:
            self.destroys.fill_(255)
        if self.error is not None:
            raise self.error


@pytest.fixture
def quantise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[str, list[str]]]:
    """Quantise three times on a GPU -> the backend that ran, and what was said."""
    ran: list[str] = []
    kernels = Kernels()
    monkeypatch.setattr(torch_ops, "quantise", lambda *arguments: ran.append("torch"))
    monkeypatch.setattr(kernels, "quantise", lambda *arguments: ran.append("triton"))
    monkeypatch.setattr(triton_kernels, "load", lambda: kernels)

    def three_times() -> tuple[str, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                dispatch.quantise(OnGpu(), OnGpu(), OnGpu(), 0)  # type: ignore[arg-type]
        assert len(ran) == 3 and len(set(ran)) == 1
        return ran[0], [str(warning.message) for warning in caught]

    return three_times


def no_compiler(device: torch.device) -> None:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


@needs_triton
def test_pytorch_serves_a_gpu_without_a_compiler_and_one_warning_says_why(gpu, monkeypatch, quantise):
    from specache.kernels.triton import trial

    monkeypatch.setattr(trial, "try_launch", no_compiler)
    backend, said = quantise()
    assert backend == "torch"
    assert len(said) == 1 and "cannot build and launch a kernel here" in said[0] and "Failed to find C compiler" in said[0]
    assert "PyTorch does, slower" in said[0]


def test_triton_that_cannot_be_imported_is_named(gpu, monkeypatch, quantise):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "specache.kernels.triton.trial", raising=False)
    real = builtins.__import__

    def importing(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "triton":
            raise ImportError("libtriton.so: version `GLIBC_2.38' not found")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    backend, said = quantise()
    assert backend == "torch"
    assert len(said) == 1 and "ImportError: libtriton.so: version `GLIBC_2.38' not found" in said[0]


def test_no_triton_says_what_to_install(gpu, monkeypatch, quantise):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backend, said = quantise()
    assert backend == "torch"
    assert len(said) == 1 and "pip install 'specache[gpu]'" in said[0]


@needs_triton
def test_a_gpu_that_is_too_old_is_named(gpu, monkeypatch, quantise):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    backend, said = quantise()
    assert backend == "torch"
    assert len(said) == 1 and "Tesla T4 has compute capability 7.5" in said[0] and "8.0" in said[0]


@needs_triton
def test_running_out_of_memory_in_the_trial_does_not_disable_triton(gpu, monkeypatch):
    from specache.kernels.triton import trial

    def full(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trial, "try_launch", full)
    with pytest.raises(torch.OutOfMemoryError):
        triton_kernels.unsupported_reason(GPU)
    monkeypatch.setattr(trial, "try_launch", lambda device: None)
    assert triton_kernels.unsupported_reason(GPU) is None


@needs_triton
def test_a_complete_installation_uses_triton_without_a_warning(gpu, monkeypatch, quantise):
    from specache.kernels.triton import trial

    monkeypatch.setattr(trial, "try_launch", lambda device: None)
    backend, said = quantise()
    assert backend == "triton" and said == []


class BuildError(Exception):
    """The error that Triton would raise."""


@pytest.fixture(params=list(Code))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, 2, 32, 64, 2, 2, 1, [4], 0, torch.float32)


def test_quantising_starts_over_on_pytorch_when_a_kernel_cannot_be_built(case, monkeypatch):
    low_bit_kv, expected = case.low_bit_kvs[0], torch_ops.dequantise(case.low_bit_kvs[0])
    kernels = Kernels(BuildError("out of shared memory"), destroys=low_bit_kv.runs[0].fields["key_codes"])
    monkeypatch.setattr(triton_kernels, "load", lambda: kernels)
    monkeypatch.setattr(triton_kernels, "build_errors", lambda: (BuildError,))
    with pytest.warns(RuntimeWarning, match=r"BuildError: out of shared memory.*PyTorch does, slower") as said:
        for _ in range(2):
            gpu_quantise.quantise(case.keys[0], case.values[0], low_bit_kv, 0)
    assert kernels.calls == 1 and len(said) == 1  # PyTorch quantises from now on
    for ours, theirs in zip(torch_ops.dequantise(low_bit_kv), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_an_error_of_a_kernel_that_runs_is_not_hidden(case, monkeypatch):
    kernels = Kernels(RuntimeError("an illegal memory access"))
    monkeypatch.setattr(triton_kernels, "load", lambda: kernels)
    monkeypatch.setattr(triton_kernels, "build_errors", lambda: (BuildError,))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            gpu_quantise.quantise(case.keys[0], case.values[0], case.low_bit_kvs[0], 0)
    assert kernels.calls == 2


@needs_triton
def test_what_counts_as_a_build_error_is_tritons():
    from triton.compiler.errors import CompilationError
    from triton.errors import TritonError
    from triton.runtime.errors import InterpreterError, OutOfResources

    errors = triton_kernels.build_errors()
    assert isinstance(OutOfResources(300_000, 101_376, "shared memory"), errors)
    assert isinstance(CompilationError("source", None, "an unknown type"), errors)
    assert not isinstance(InterpreterError("while it ran"), errors) and not issubclass(RuntimeError, errors)
    assert all(issubclass(error, TritonError) for error in errors)
    assert triton_kernels.error_summary(CompilationError("def kernel():\n    pass", None, "an unknown type")).endswith(
        "an unknown type"
    )


def test_a_pytorch_without_cuda_is_told_from_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(machine.cuda_missing())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "sees no CUDA device" in str(machine.cuda_missing())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.cuda_missing() is None


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "-m", "MODEL", "--prompt", "hello"),
        ("chat", "-m", "MODEL"),
        ("demo", "-m", "MODEL"),
        ("eval", "perplexity", "-m", "MODEL", "--methods", "full", "--out", "OUT"),
    ],
    ids=lambda command: command[0],
)
def test_device_cuda_without_cuda_says_what_to_do(tiny_folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    places = {"MODEL": str(tiny_folder), "OUT": str(tmp_path / "out")}
    refused = run(*(places.get(word, word) for word in command), "--device", "cuda", stdin="hello\n", code=2)
    text = one_line(refused.stderr)
    assert "error: --device cuda: " in text and "Use --device cpu; 'specache doctor' says" in text
    assert "Traceback" not in text and refused.stdout == ""


def test_a_plan_for_cuda_needs_no_gpu(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cuda" in run("plan", "-m", tiny_folder, "--context", "400", "--device", "cuda").stdout


@needs_triton
def test_doctor_says_that_triton_is_broken(gpu, monkeypatch):
    from specache.kernels.triton import trial

    monkeypatch.setattr(trial, "try_launch", no_compiler)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    facts = diagnosis.diagnose()
    facts["devices"]["cuda"] = ["A GPU, 80 GB"]
    problem = next(problem for problem in diagnosis.find_problems(facts) if "Triton" in problem.what)
    assert "Failed to find C compiler" in problem.what and "PyTorch's kernels" in problem.advice


def test_doctor_says_that_a_gpu_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "has_nvidia_gpu", lambda: True)
    text = one_line(run("doctor").stdout)
    assert "There is an NVIDIA GPU, but models run on the CPU: this PyTorch" in text and "pytorch.org/get-started" in text
