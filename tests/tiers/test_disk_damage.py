"""Files that were removed, truncated, replaced or changed: an error names the row, and no wrong
token is generated.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specache.errors import CorruptRowError, SlowTierError
from specache.tiers.disk import tier_files
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.disk.probe import ReaderReport
from tests.cache.test_invariants import settings
from tests.tiers.faults import Steps
from tests.tiers.tier_rows import fill, nothing_left, row_file


def saved(folder: Path) -> tuple[dict[int, Any], dict[int, torch.Tensor], Path]:
    tier = DiskTier(folder, temporary=False)
    fill(tier, 200)
    path = row_file(tier)
    state = tier.extents(), tier.tails(), path
    tier.close()
    return state


def test_opening_a_session_with_a_removed_file_fails(tmp_path):
    tables, tails, path = saved(tmp_path)
    path.unlink()
    with nothing_left(tmp_path), pytest.raises(SlowTierError, match=f"{path} cannot be opened: No such file.*start again"):
        DiskTier.open(tmp_path, tables, tails)


def test_opening_a_session_with_a_truncated_file_fails(tmp_path):
    tables, tails, path = saved(tmp_path)
    os.truncate(path, path.stat().st_size - 1)
    with nothing_left(tmp_path), pytest.raises(SlowTierError, match=f"{path}.*it was cut short"):
        DiskTier.open(tmp_path, tables, tails)


def test_a_symbolic_link_is_not_followed(tmp_path):
    tables, tails, path = saved(tmp_path)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SlowTierError, match="symbolic link"):
        DiskTier.open(tmp_path, tables, tails)


@pytest.mark.parametrize("reader", ["io_uring", "threads", "buffered"])
def test_a_file_truncated_after_opening_fails_naming_the_row(tmp_path, monkeypatch, reader):
    report = tier_files.report_for(tmp_path)
    monkeypatch.setattr(tier_files, "report_for", lambda folder: ReaderReport(reader, report.direct and reader != "buffered", 4096))
    tier = DiskTier(tmp_path)
    try:
        fill(tier, 200)
    except OSError as error:
        pytest.skip(f"no {reader} here: {error}")
    layout = tier._layers[0].layout
    os.truncate(row_file(tier), 2 * layout.block_bytes)
    with pytest.raises(
        SlowTierError, match=rf"{row_file(tier)}: the row of layer 0, KV head 1, token 130 cannot be read: the file ends"
    ):
        tier.gather(0, torch.tensor([0, 1, 1]), torch.tensor([3, 140, 130]))
    with pytest.raises(SlowTierError, match=r"layer 0, KV head 0, token 128 cannot be read: the file ends"):
        tier.read(0, 100, 180)
    tier.close()


def test_a_file_truncated_behind_the_requested_row_fails(tmp_path):
    """Reads are widened to the device's alignment: the row exists, but the rest of its read does
    not.
    """
    tier = DiskTier(tmp_path)
    fill(tier, 200)
    layout = tier._layers[0].layout
    os.truncate(row_file(tier), 2 * layout.block_bytes + 3 * layout.stride + 100)
    with pytest.raises(SlowTierError, match=r"layer 0, KV head 0, token 130 cannot be read: the file ends"):
        tier.gather(0, torch.tensor([0, 0]), torch.tensor([3, 130]))
    tier.close()


@pytest.mark.parametrize("kind", ["flipped", "cut"])
def test_a_damaged_file_raises_and_yields_no_wrong_token(model, tmp_path, kind):
    """The whole path, with the reader that the folder really gets."""
    config = settings(policy="verified", slow_tier=f"disk:{tmp_path}", hot_set=0.0, top_k=64)
    with nothing_left_but_the_readers(tmp_path):
        steps = Steps(model, config, 230)
        for path in tmp_path.rglob("*-L001.rows"):
            if kind == "cut":
                os.truncate(path, 0)
            else:
                data = np.fromfile(path, np.uint8)
                data[::97] ^= 4
                data.tofile(path)
        with pytest.raises(
            SlowTierError if kind == "cut" else CorruptRowError, match=r"-L001\.rows.*layer 1, KV head \d, token \d+"
        ):
            for i in range(4):
                steps.step(i)
        steps.cache.close()


def nothing_left_but_the_readers(folder: Path) -> Any:
    tier = DiskTier(folder)
    fill(tier, 10)  # the probe's imports and threads are not tested
    tier.close()
    return nothing_left(folder)
