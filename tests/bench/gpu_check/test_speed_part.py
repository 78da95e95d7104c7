"""What the profile of a step counts."""

from __future__ import annotations

import torch
from torch.autograd import DeviceType

from specache.bench.gpu_check.speed_part import run_on


def test_the_profile_finds_what_ran_on_a_device():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(8).add(1)
    assert "aten::add" in {one.key for one in run_on(profiler, DeviceType.CPU)}
    assert not run_on(profiler, DeviceType.CUDA)
