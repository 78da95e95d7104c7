"""Missing components of a machine are named in one warning, and a fallback is used."""

from __future__ import annotations

import builtins
import importlib.util
import sys
import warnings
from typing import Any

import pytest
import torch

from specache.cli import diagnosis
from specache.config import Code
from specache.kernels import dispatch
from specache.kernels import triton as triton_kernels
from specache.kernels.guarded import GuardedKernels
from specache.kernels.torch import operations as torch_ops
from specache.low_bit.layout import PageLayout
from specache.platform import machine
from tests.cli.running import one_line, run
from tests.kernels.test_native import Case

GPU = torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Reasons are found once per process; here each test has its own machine."""
    for remembered in (triton_kernels.launch_failure, dispatch._unsupported_reason, dispatch._warn_unsupported):
        remembered.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as PyTorch reports it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")


class OnGpu:
    """A tensor for `dispatch._backend_for`, which looks at nothing else."""

    device, dtype, shape = GPU, torch.float32, (1, 4, 1, 64)


LOW_BIT_KV = PageLayout(Code.ROTATED, 2, 64, 1, 64).low_bit_kv((), 0)


def served_and_said() -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backends = {dispatch._backend_for(OnGpu(), LOW_BIT_KV) for _ in range(3)}  # type: ignore[arg-type]
    assert len(backends) == 1
    return backends.pop(), [str(warning.message) for warning in caught]


def no_compiler(device: torch.device) -> None:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


@needs_triton
def test_pytorch_serves_a_gpu_without_a_compiler_and_one_warning_says_why(gpu, monkeypatch):
    from specache.kernels.triton import trial

    monkeypatch.setattr(trial, "try_launch", no_compiler)
    backend, said = served_and_said()
    assert backend is torch_ops
    assert len(said) == 1 and "cannot build and launch a kernel here" in said[0] and "Failed to find C compiler" in said[0]
    assert "PyTorch does, slower" in said[0]


def test_triton_that_cannot_be_imported_is_named(gpu, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "specache.kernels.triton.trial", raising=False)
    real = builtins.__import__

    def importing(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "triton":
            raise ImportError("libtriton.so: version `GLIBC_2.38' not found")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    backend, said = served_and_said()
    assert backend is torch_ops
    assert len(said) == 1 and "ImportError: libtriton.so: version `GLIBC_2.38' not found" in said[0]


def test_no_triton_says_what_to_install(gpu, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backend, said = served_and_said()
    assert backend is torch_ops
    assert len(said) == 1 and "pip install 'specache[gpu]'" in said[0]


@needs_triton
def test_a_gpu_that_is_too_old_is_named(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    backend, said = served_and_said()
    assert backend is torch_ops
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
def test_a_complete_installation_uses_triton_without_a_warning(gpu, monkeypatch):
    from specache.kernels.triton import trial

    monkeypatch.setattr(trial, "try_launch", lambda device: None)
    backend, said = served_and_said()
    assert isinstance(backend, GuardedKernels) and said == []


class BuildError(Exception):
    """The error that Triton would raise."""


class Broken:
    """PyTorch kernels of which one fails to build; `attend` destroys the scores before it fails."""

    def __init__(self, operation: str, error: Exception) -> None:
        self.operation, self.error, self.calls = operation, error, 0

    def __getattr__(self, operation: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if operation == self.operation:
                if operation == "attend":
                    arguments[0].fill_(-torch.inf)
                raise self.error
            return getattr(torch_ops, operation)(*arguments)

        return call


def layer_of_a_step(kernels: Any, case: Case) -> list[torch.Tensor]:
    scores = kernels.score(case.query, case.low_bit_kvs, case.lengths, 0.2, None)
    positions = kernels.select(scores, case.rest, case.lengths, 8)
    stored = [torch.cat([keys, values], dim=-1) for keys, values in zip(case.keys, case.values, strict=True)]
    heads = torch.arange(case.heads)[:, None, None]
    rows = torch.stack([rows[heads, chosen.clamp(min=0)] for rows, chosen in zip(stored, positions, strict=True)])
    kernels.rescore(case.query, scores, positions, rows, 0.2, None)
    return [positions, *kernels.attend(scores, positions, rows, case.low_bit_kvs, case.lengths)]


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(Code.ROTATED, 2, 32, 64, 2, 2, 1, [4, 2], 0, torch.float32)


@pytest.mark.parametrize("operation", ["score", "select", "rescore", "attend"])
def test_a_kernel_that_cannot_be_built_is_replaced_with_its_arguments_intact(case, operation):
    given_up: list[Exception] = []
    broken = Broken(operation, BuildError("out of shared memory"))
    guarded = GuardedKernels(broken, (BuildError,), given_up.append)
    expected = layer_of_a_step(torch_ops, case)
    for got, wanted in zip(layer_of_a_step(guarded, case), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert given_up == [broken.error]
    calls = broken.calls
    layer_of_a_step(guarded, case)
    assert broken.calls == calls and len(given_up) == 1  # PyTorch serves from now on


@pytest.mark.parametrize("operation", ["score", "attend"])
def test_an_error_of_a_kernel_that_runs_is_not_hidden(case, operation):
    given_up: list[Exception] = []
    guarded = GuardedKernels(Broken(operation, RuntimeError("an illegal memory access")), (BuildError,), given_up.append)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        layer_of_a_step(guarded, case)
    assert not given_up


def test_a_failed_kernel_that_destroyed_its_input_is_not_retried(case):
    broken = Broken("none", BuildError("late"))
    guarded = GuardedKernels(broken, (BuildError,), lambda error: None)
    layer_of_a_step(guarded, case)
    broken.operation = "attend"  # it was built for this kind of layer before
    with pytest.raises(BuildError):
        layer_of_a_step(guarded, case)


@needs_triton
def test_what_counts_as_a_build_error_is_tritons(case):
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
