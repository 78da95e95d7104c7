"""Available memory is the least that the system and the surrounding control groups have left."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from specache.platform import machine

STAT = "cache 9\ninactive_file 3\nactive_file 4\ntotal_inactive_file 30\ntotal_active_file 20\n"
V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"


@pytest.fixture
def files(monkeypatch):
    """Files of /proc and /sys by name.

    No others exist, and the system reports only `MemAvailable`.
    """
    there: dict[str, str] = {"/proc/meminfo": "MemAvailable:  1 kB\nSwapFree: 5 kB\n"}
    monkeypatch.setattr(machine, "file_lines", lambda path: there[path].splitlines() if path in there else [])
    return there


def test_without_a_limit_the_system_says_what_is_free(files):
    assert machine.available_memory() == 1024 and machine.free_swap() == 5120


def test_page_cache_inside_a_group_of_version_2_counts_as_free(files):
    files |= {"/proc/self/cgroup": "0::/a/b", f"{V2}/a/b/memory.max": "500", f"{V2}/a/b/memory.current": "200"}
    assert machine.available_memory() == 300
    files[f"{V2}/a/b/memory.stat"] = STAT
    assert machine.available_memory() == 307


def test_page_cache_inside_a_group_of_version_1_counts_with_that_of_its_children(files):
    files |= {"/proc/self/cgroup": "8:pids:/\n4:cpu,memory:/a", f"{V1}/a/memory.limit_in_bytes": "500"}
    files |= {f"{V1}/a/memory.usage_in_bytes": "200", f"{V1}/a/memory.stat": STAT}
    assert machine.available_memory() == 350


@pytest.mark.parametrize(
    ("cgroup", "mount", "limit", "usage"),
    [
        ("0::/out/in", V2, "memory.max", "memory.current"),
        ("4:memory:/out/in", V1, "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_of_nested_groups_the_tightest_counts(files, cgroup, mount, limit, usage):
    files |= {"/proc/self/cgroup": cgroup, f"{mount}/out/in/{limit}": "1000", f"{mount}/out/in/{usage}": "100"}
    assert machine.available_memory() == 900
    files |= {f"{mount}/out/{limit}": "600", f"{mount}/out/{usage}": "550"}
    assert machine.available_memory() == 50 and machine.control_group() == (600, 550)


def test_a_container_that_sees_its_group_as_the_root_is_limited(files):
    files |= {"/proc/self/cgroup": "4:memory:/docker/1234", f"{V1}/memory.limit_in_bytes": "900"}
    assert machine.available_memory() == 900


def test_where_a_group_is_slowed_down_before_it_is_full_that_is_its_limit(files):
    files |= {f"{V2}/memory.max": "max", f"{V2}/memory.high": "700", f"{V2}/memory.current": "100"}
    assert machine.available_memory() == 600


def test_a_group_that_uses_more_than_its_limit_has_nothing_left(files):
    files |= {f"{V2}/memory.max": "100", f"{V2}/memory.current": "200"}
    assert machine.available_memory() == 0


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({"0::/a/b": {f"{V2}/a/b/cpu.max": "max 100000"}}, 8),
        ({"0::/a/b": {f"{V2}/a/b/cpu.max": "200000 100000"}}, 2),
        ({"0::/a/b": {f"{V2}/a/cpu.max": "350000 100000", f"{V2}/a/b/cpu.max": "max 100000"}}, 3),
        ({"0::/a/b": {f"{V2}/a/b/cpu.max": "50000 100000"}}, 1),
        ({"0::/a/b": {f"{V2}/a/b/cpu.max": "6400000 100000"}}, 8),
        ({"0::/a/b": {f"{V2}/a/b/cpu.max": "broken"}}, 8),
        ({"3:cpu,cpuacct:/a": {f"{V2}/cpu/a/cpu.cfs_quota_us": "-1", f"{V2}/cpu/a/cpu.cfs_period_us": "100000"}}, 8),
        ({"3:cpu,cpuacct:/a": {f"{V2}/cpu/a/cpu.cfs_quota_us": "150000", f"{V2}/cpu/a/cpu.cfs_period_us": "50000"}}, 3),
        ({"3:cpu:/docker/1": {f"{V2}/cpu/cpu.cfs_quota_us": "400000", f"{V2}/cpu/cpu.cfs_period_us": "100000"}}, 4),
    ],
)
def test_no_more_threads_than_a_containers_limit_lets_run(files, monkeypatch, limits, cores):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for group, there in limits.items():
        files |= {"/proc/self/cgroup": group, **there}
    assert machine.usable_cores() == cores


def test_this_machine_reports_its_available_memory():
    free = machine.available_memory()
    assert free is None or 0 < free < 1 << 50


def test_mapped_files_are_told_from_memory(tmp_path):
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 16))
    mapped = torch.from_file(str(path), shared=False, size=1 << 14, dtype=torch.float32)
    held = torch.empty(1 << 20)
    assert machine.mapped_bytes([(mapped.data_ptr(), mapped.nbytes), (held.data_ptr(), held.nbytes)]) == mapped.nbytes
    anonymous = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert machine.mapped_bytes([(torch.frombuffer(anonymous, dtype=torch.uint8).data_ptr(), 4096)]) == 0


def test_without_a_list_of_mappings_every_weight_counts_as_mapped(files):
    assert machine.mapped_bytes([(0, 5), (100, 7)]) == 12


def cache_files(core: int, index: int, level: int, size: str, shared: str, kind: str = "Unified") -> dict[str, str]:
    folder = f"/sys/devices/system/cpu/cpu{core}/cache/index{index}"
    return {f"{folder}/level": f"{level}\n", f"{folder}/size": size, f"{folder}/shared_cpu_list": shared, f"{folder}/type": kind}


def test_the_last_level_caches_of_all_cores_count_once_each(files, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    for core, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3"), (4, "4-5")):
        files |= cache_files(core, 0, 1, "48K", str(core), "Data")
        files |= cache_files(core, 1, 2, "2048K", str(core))
        files |= cache_files(core, 2, 3, "32M", shared)
    assert machine.last_level_cache() == 2 * 32 << 20  # cores 4 and 5 are not this process's


def test_without_a_shared_cache_every_cores_own_counts(files, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    files |= cache_files(0, 0, 2, "512K", "0") | cache_files(1, 0, 2, "512K", "1")
    assert machine.last_level_cache() == 1 << 20


@pytest.mark.parametrize("size", ["", "unknown", "K"])
def test_a_system_that_does_not_report_caches_has_none(files, monkeypatch, size):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert machine.last_level_cache() is None
    files |= cache_files(0, 0, 3, size, "0")
    assert machine.last_level_cache() is None
