"""`specache doctor`: the facts, and what to do about problems."""

from __future__ import annotations

import pytest

from specache import linear
from specache.cli import diagnosis
from specache.kernels import dispatch
from specache.platform import machine
from specache.tiers.disk import probe
from tests.cli.running import one_line, run, run_json
from tests.tiers.tier_rows import SecondsPerLook


def test_json_has_every_section():
    facts = run_json("doctor")
    sections = {
        "versions",
        "cpu",
        "memory",
        "devices",
        "kernels",
        "native_kernels",
        "product_kernels",
        "gpu_kernels",
        "compiled",
        "cache",
        "disk_tier",
        "auto_tier",
        "demo_model",
        "server",
        "problems",
    }
    assert set(facts) == sections
    assert facts["kernels"] == dispatch.active()
    assert facts["product_kernels"] == linear.kernel_names()
    assert facts["cpu"]["cores"] >= 1 and facts["versions"]["torch"]


def test_it_says_how_a_server_would_compute():
    facts = run_json("doctor")["server"]
    assert 1 <= facts["threads"] <= facts["threads_with_clients_elsewhere"] == (machine.usable_cores() or 1)
    assert facts["threads_wait"] == "passive" and facts["missing"] == []
    assert "Server (specache serve)" in one_line(run("doctor").stdout)


def test_the_report_names_versions_kernels_and_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path / "here"))
    text = run("doctor").stdout
    assert all(word in text for word in ("transformers", "quantise", "Memory", "Cache folder"))
    assert str(tmp_path / "here") in text.replace("\n", "").replace(" ", "")


def test_the_report_names_the_products_in_use():
    text = one_line(run("doctor").stdout)
    assert "Matrix products by weights" in text
    assert all(name in text for name in linear.kernel_names().values())


def test_a_cache_folder_that_cannot_be_written_is_fatal(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("SPECACHE_CACHE", str(file / "inside"))
    result = run("doctor", code=1)
    assert "cannot be written" in one_line(result.stdout) and "Set SPECACHE_CACHE" in one_line(result.stdout)


def test_how_the_disk_tier_reads_is_measured_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "time", SecondsPerLook())
    disk = run_json("doctor")["disk_tier"]
    assert disk["measured_in"] == str(tmp_path)
    assert disk["reader"] in ("io_uring", "threads", "buffered") and disk["alignment_bytes"] in (512, 4096)
    assert disk["read_bytes_per_second"] == probe.PROBE_BYTES and disk["read_4k_seconds"] == 1 / probe._RANDOM_READS
    text = one_line(run("doctor").stdout)
    assert all(word in text for word in ("Tier disk", "direct io", "read 4k", " us", "B/s"))
    assert not list(tmp_path.iterdir())


def test_a_missing_demo_model_is_no_failure(monkeypatch):
    monkeypatch.setattr(diagnosis, "demo_gguf", lambda: None)
    facts = run_json("doctor")
    assert any("demo model" in problem["what"] and "pip install" in problem["advice"] for problem in facts["problems"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory": {"usable_bytes": 10**9}}, "Less than 2 GB"),
        ({"native_kernels": {"missing": "no module"}}, "C++ kernels are not installed"),
        ({"devices": {"cuda": ["an old one"]}, "gpu_kernels": {"missing": "too old"}}, "Triton kernels do not run here: too old"),
        ({"cpu": {"bfloat16": False}}, "no bfloat16"),
        ({"versions": {"gguf": None}}, "Not installed: gguf"),
        ({"cache": {"free_bytes": 10**6}}, "Little disk space"),
    ],
)
def test_each_problem_is_recognised(change, words):
    facts = diagnosis.diagnose()
    facts["devices"]["cuda"] = []
    for section, values in change.items():
        facts[section] |= values
    assert any(words in problem.what for problem in diagnosis.find_problems(facts))


def test_a_system_without_proc_is_no_problem(monkeypatch):
    monkeypatch.setattr(machine, "file_lines", lambda path: [])
    assert run_json("doctor")["cpu"]["features"] == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/sys/fs/cgroup/memory.max": "1000", "/sys/fs/cgroup/memory.current": "10"}, (1000, 10)),
        ({"/sys/fs/cgroup/memory.max": "max"}, (None, None)),
        ({"/proc/self/cgroup": "0::/a", "/sys/fs/cgroup/a/memory.max": "7"}, (7, None)),
        ({"/sys/fs/cgroup/memory/memory.limit_in_bytes": str(1 << 62)}, (None, None)),
        ({"/sys/fs/cgroup/memory/memory.limit_in_bytes": "99"}, (99, None)),
    ],
)
def test_the_limit_of_a_container_is_found(monkeypatch, files, expected):
    monkeypatch.setattr(machine, "file_lines", lambda path: files[path].splitlines() if path in files else [])
    assert machine.control_group() == expected
