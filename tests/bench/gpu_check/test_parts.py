"""The parts of `gpu-check`: smaller GPUs, tests that crash, the build, the measured device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specache.bench import torch_attention
from specache.bench.gpu_check import beside, build_part, kernels_part
from specache.bench.gpu_check import check_sizes as sizes
from specache.bench.gpu_check import part_runner as runner
from specache.bench.gpu_check import result_page as report
from specache.bench.gpu_check.check_sizes import GB, Sizes
from specache.bench.gpu_check.checks import Check, PartRun
from specache.bench.gpu_check.device_text import device_text
from specache.bench.gpu_check.marked_tests import cuda_tests, run_tests
from specache.bench.gpu_check.part_runner import Run, run_parts
from specache.bench.gpu_check.parts import PARTS, Part
from specache.bench.gpu_check.states import PartJob
from specache.bench.torch_attention import gpu_baselines
from specache.planning.roofline.device_file import device_from_file
from tests.bench.gpu_check.test_runner import LIMIT_S, failed, part, time_is_up_with

FACTS = {
    "rates": {
        "read_gb_per_s": 4100.0,
        "copy_gb_per_s": 4300.0,
        "to_device_gb_per_s": 55.0,
        "to_host_gb_per_s": 54.0,
        "gather_gb_per_s": 44.0,
        "matrix_tflops": 788.0,
    },
    "gpu": {"name": "NVIDIA H200", "memory_bytes": 150_000_000_000, "vector_tflops": 67.0, "vector_source": "a datasheet"},
}


def part_run(folder: Path, tree: Path | None = None, seconds: float = LIMIT_S, device: str = "cpu") -> PartRun:
    return PartRun(
        PartJob("none", str(folder / "state.json"), str(folder), str(folder), None if tree is None else str(tree), device, seconds)
    )


# Sizes


def test_a_gpu_of_40_gb_runs_everything():
    full = Sizes()
    assert full.within(141 * GB) == full
    found = full.within(44 * GB)
    assert found.layer_cells == full.layer_cells and found.models == full.models
    assert found.paper_bytes < 44 * GB and len(found.notes) == 1 and "within 40 GB, not 48" in found.notes[0]


@pytest.mark.parametrize("free", [8, 15, 23])
def test_a_smaller_gpu_runs_less_and_says_what_is_left_out(free):
    found = Sizes().within(free * GB)
    assert all(sizes._needed(one) <= free * GB for one in found.models)
    assert max(context * batch for context, batch in found.layer_cells) < 131072 * 8
    assert found.paper == "llama-3.2-1b" if free < 22 else found.paper == "mistral-7b"
    assert f"{free} GB of GPU memory are free" in found.notes[0] and "131,072 x 8" in found.notes[0]
    if free < 20:
        assert "llama-3-8b at 32,768" in found.notes[0]


def test_tiny_sizes_stand_for_all_of_them():
    assert Sizes.on("cpu") is sizes.CPU_SIZES and "tiny" in Sizes.on("cpu").notes[0]


# The tests marked `cuda`


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes of pytest start without the plugins that are installed, which takes seconds."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


TESTS = """
import os, signal, pytest
def test_first(): pass
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_wrong(): assert 1 + 1 == 3
def test_loses_the_gpu(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.skip(reason="no such GPU")
def test_not_here(): pass
def test_last(): pass
"""


@pytest.mark.parametrize("processes", [1, 3])
def test_tests_go_on_after_a_crash_and_after_the_gpu_is_lost(tmp_path, no_plugins, processes):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "test_some.py").write_text(TESTS)
    run = part_run(tmp_path, tree)
    found = {one["id"].partition("::")[2]: one for one in run_tests(run, ["test_some.py"], [], processes, LIMIT_S)}
    assert {name: one["outcome"] for name, one in found.items()} == {
        "test_first": "passed",
        "test_crashes": "failed",
        "test_wrong": "failed",
        "test_loses_the_gpu": "failed",
        "test_not_here": "skipped",
        "test_last": "passed",
    }
    assert "SIGSEGV" in found["test_crashes"]["message"] and "assert" in found["test_wrong"]["message"]
    assert "illegal memory access" in found["test_loses_the_gpu"]["message"]
    check = Check("told")
    with pytest.raises(Exception, match="no such GPU"):
        kernels_part._told(check, found["test_not_here"])


HANGS = """
import pathlib, time
def test_first(): pass
def test_hangs():
    pathlib.Path({file!r}).write_text("for ever")
    time.sleep(600)
"""


def test_a_test_that_hangs_is_named(tmp_path, no_plugins, monkeypatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "test_some.py").write_text(HANGS.format(file=str(tmp_path / "waits")))
    time_is_up_with(monkeypatch, tmp_path / "waits")
    found = run_tests(part_run(tmp_path, tree), ["test_some.py"], [], 1, LIMIT_S)
    assert [one["outcome"] for one in found] == ["failed", "passed"]
    assert "its time was up" in found[0]["message"]


def test_the_tests_for_a_gpu_are_found():
    tree = runner.source_tree()
    assert tree is not None
    files = cuda_tests(tree)
    assert {"tests/kernels/test_cuda_hardest.py", "tests/device/test_cuda.py", "tests/attention/test_dense.py"} <= set(files)


# The build beside the parts


def built_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seconds: float = LIMIT_S) -> report.Results:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(runner, "work_folder", lambda tree: work)
    monkeypatch.setattr(runner, "has_extension", lambda: False)
    monkeypatch.setattr(runner, "BUILD", Part(1, "environment", f"tests.bench.gpu_check.broken_parts:{name}", seconds))
    monkeypatch.setattr(beside, "LEAST_S", 5.0)
    return run_parts([part("passes"), part("passes", 2)], Run(tmp_path / "out", "cpu"), lambda text: None)


def test_what_is_built_beside_joins_part_1(tmp_path, monkeypatch):
    results = built_beside(tmp_path, monkeypatch, "says")
    assert results.status == "passed"
    assert [check["name"] for check in results.parts[1]["checks"]] == ["right", "noisy"]
    assert "said on stdout" in (tmp_path / "out" / report.LOG_NAME).read_text()


@pytest.mark.parametrize(
    ("name", "check"), [("fails", "wrong numbers"), ("hangs", "waits for ever"), ("is_killed", "takes all memory")]
)
def test_a_build_that_goes_wrong_fails_part_1_alone(tmp_path, monkeypatch, name, check):
    results = built_beside(tmp_path, monkeypatch, name, seconds=6.0 if name == "hangs" else LIMIT_S)
    assert check in failed(results.parts[1])
    assert results.parts[1]["status"] == "failed" and results.passed(2)


def test_a_build_without_a_compiler_says_what_pip_said(tmp_path):
    """Here pip has no project to build."""
    tree = tmp_path / "sources"
    tree.mkdir()
    run = part_run(tmp_path, tree)
    run.run("build", lambda check: build_part.build_extension(run, check, tmp_path / "site"))
    assert run.checks[0].status == "failed" and "pip failed, its process ended with exit code 1" in run.checks[0].message
    assert not (tmp_path / "site").exists()  # later parts run from the sources


def test_a_package_without_sources_builds_nothing(tmp_path):
    run = part_run(tmp_path)
    run.run("build", lambda check: build_part.build_extension(run, check, tmp_path / "site"))
    assert run.checks[0].status == "skipped"


def test_parts_prefer_what_was_built(tmp_path):
    assert runner.environment("cpu", tmp_path, None)["PYTHONPATH"].split(":")[0] == str(runner.PACKAGE.parent)
    (tmp_path / "site" / "specache").mkdir(parents=True)
    found = runner.environment("cuda", tmp_path, tmp_path / "tree")
    assert found["PYTHONPATH"].split(":")[:2] == [str(tmp_path / "site"), str(tmp_path / "tree")]
    assert "CUDA_VISIBLE_DEVICES" not in found or found["CUDA_VISIBLE_DEVICES"]


# Speed


def test_a_machine_without_flash_attention_is_compared_with_the_rest(monkeypatch):
    def none(*arguments: Any) -> Any:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch_attention, "_flash", lambda run: none)
    query, rows = torch.randn(2, 4, 1, 16), torch.randn(2, 64, 16)
    assert [one.impl for one in gpu_baselines(query, rows, rows)] == ["sdpa bf16", "sdpa bf16, heads as rows"]


def test_measured_rates_describe_a_device_to_the_planner(tmp_path):
    file = tmp_path / "device.toml"
    file.write_text(device_text(FACTS))
    device = device_from_file(file)
    assert device.memory_rate == 4300e9 and device.matrix_rate == 788e12
    assert device.link_gb_per_s == 55 and device.link_rate == pytest.approx(44e9)
    assert device.memory_gib == pytest.approx(139.7, abs=0.1)
    assert "measured" in device.source_of("memory_gb_per_s") and device.source_of("vector_tflops") == "a datasheet"


def test_the_device_file_is_written_as_soon_as_rates_are_known(tmp_path):
    results = report.Results(tmp_path, {"tree": "t"})
    state = {"checks": [], "tables": {}, "notes": [], "facts": FACTS, "running": None, "complete": False}
    results.set(5, report.record_of("speed", state, None, 1.0, running=True))
    assert device_from_file(tmp_path / report.DEVICE_NAME).matrix_tflops == 788


# The page


def test_the_page_begins_with_what_failed(tmp_path):
    checks = [
        {"name": "right", "status": "passed", "message": "", "seconds": 0.1, "details": {"ms": 1.5}, "warned": ["slow"]},
        {"name": "wrong", "status": "failed", "message": "2 is not 3\nat line 1", "seconds": 0.1, "details": {}, "warned": []},
        {"name": "elsewhere", "status": "skipped", "message": "no such GPU", "seconds": 0.0, "details": {}, "warned": []},
    ]
    state = {
        "checks": checks,
        "tables": {"numbers": [{"a": 1, "b": None}, {"a": 12345.6, "c": "x"}]},
        "notes": ["A note."],
        "facts": {},
        "running": None,
        "complete": True,
    }
    results = report.Results(tmp_path, {"tree": "t", "device": "cuda"})
    results.set(3, report.record_of("generate", state, None, 2.0))
    lines = (tmp_path / report.TEXT_NAME).read_text().splitlines()
    assert lines[0] == "specache GPU check: FAILED" and lines[3] == "FAILED: 1 checks"
    assert lines[4] == "  3 wrong: 2 is not 3"
    for text in ("  3 elsewhere: no such GPU", "      A note.", "NUMBERS", "  12,346  -  x", "      warned: slow"):
        assert text in lines, text
    assert len(list(tmp_path.iterdir())) <= 8
    assert json.loads((tmp_path / report.JSON_NAME).read_text())["status"] == "failed"


def test_a_file_that_is_no_result_is_replaced(tmp_path):
    (tmp_path / report.JSON_NAME).write_text('{"parts": 3')
    assert report.Results(tmp_path, {}).parts == {}


# All of it


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes, on a busy machine many
def test_everything_passes_on_a_cpu(tmp_path):
    """`make gpu-check DEVICE=cpu`, in one process: a mistake shows here, not on a GPU."""
    everything = Part(1, "environment", "tests.bench.gpu_check.all_parts:run", sum(one.seconds for one in PARTS))
    results = run_parts([everything], Run(tmp_path / "out", "cpu", slack=10.0), print)
    print((tmp_path / "out" / report.TEXT_NAME).read_text())
    assert results.status == "passed"
    found = {name: len(rows) for record in results.parts.values() for name, rows in record["tables"].items()}
    assert found["one layer of a step (ms by CUDA events)"] > 4 and found["rates"] == 6
    assert sum(len(record["checks"]) for record in results.parts.values()) > 40
    skipped = [check["name"] for record in results.parts.values() for check in record["checks"] if check["status"] == "skipped"]
    assert not skipped
