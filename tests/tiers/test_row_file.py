"""The layout of rows on disk: its sizes, and that checksums detect every damaged or misplaced
row.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from specache.errors import CorruptRowError, SlowTierError
from specache.tiers.disk.checksum import checksums, head_salts, multipliers, row_salts
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.disk.row_layout import BLOCK_ALIGNMENT, BLOCK_TOKENS, RowLayout, file_name
from tests.tiers.tier_rows import everything, fill, random_rows, row_file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
def test_a_block_holds_its_rows_and_their_checksums_in_whole_device_blocks(dim, dtype):
    layout = RowLayout(3, dim, dtype.itemsize)
    assert layout.row_bytes == 2 * dim * dtype.itemsize
    assert layout.stride == layout.row_bytes + 8
    used = 3 * BLOCK_TOKENS * layout.stride
    assert used <= layout.block_bytes < used + BLOCK_ALIGNMENT
    assert layout.block_bytes % BLOCK_ALIGNMENT == 0
    offset = int(layout.offsets(np.array(5), np.array(2), np.array(63)))
    assert layout.place(offset) == layout.place(offset + layout.stride - 1) == (5, 2, 63)
    assert layout.place(offset - 1) == (5, 2, 62)


def test_a_file_has_the_documented_layout(tmp_path):
    keys, values = random_rows(2, 128, 32, torch.float32)
    tier = DiskTier(tmp_path, temporary=False)
    tier.write(7, 0, keys, values)
    (extent,) = tier.extents()[7]
    path = tmp_path / file_name(extent.segment, 7)
    assert path == row_file(tier, 7)
    block = np.fromfile(path, np.uint8).reshape(2, -1)[1]
    row = block[(64 + 9) * (256 + 8) :][:264]  # head 1, token 64 + 9
    assert torch.equal(torch.from_numpy(row[:256].view(np.float32)), torch.cat([keys[1, 73], values[1, 73]]))
    salt = row_salts(head_salts(extent.segment, 7, 2)[1:], np.array([73]), np.array([1]))
    assert checksums(row[:256].view(np.uint64)[None], salt)[0] == row[256:].view(np.uint64)[0]
    assert not block[2 * 64 * 264 :].any()
    tier.close()


def test_an_odd_number_of_bytes_is_refused():
    with pytest.raises(SlowTierError, match="even head dimension"):
        RowLayout(2, 33, 2)


def flipped(row: np.ndarray, *bits: int) -> np.ndarray:
    changed = row.copy()
    for bit in bits:
        changed.view(np.uint8)[bit // 8] ^= 1 << bit % 8
    return changed


@pytest.mark.parametrize("row", [np.zeros(16, np.uint64), np.random.default_rng(0).integers(0, 2**64, 16, np.uint64)])
def test_every_flipped_bit_and_every_pair_of_them_changes_the_checksum(row):
    salt = np.zeros(1, np.uint64)
    bits = row.nbytes * 8
    good = checksums(row[None], salt)[0]
    one = np.stack([flipped(row, bit) for bit in range(bits)])
    assert (checksums(one, salt) != good).all()
    random = np.random.default_rng(1)
    two = np.stack([flipped(row, *random.choice(bits, 2, replace=False)) for _ in range(20_000)])
    assert (checksums(two, salt) != good).all()
    tops = np.stack(
        [flipped(row, 64 * i + 63, 64 * j + 63) for i in range(16) for j in range(i)]
    )  # a plain weighted sum misses these
    assert (checksums(tops, salt) != good).all()


def test_the_multipliers_are_odd_and_differ_where_two_flipped_bits_could_cancel():
    values = multipliers(512)
    assert (values % 2 == 1).all()
    low = values & np.uint64(2**33 - 1)
    assert len(np.unique(np.concatenate([low, (-low) & np.uint64(2**33 - 1)]))) == 1024


def test_salts_differ_by_segment_layer_head_token_and_block():
    salts = [
        int(row_salts(head_salts(segment, layer, 3)[head : head + 1], np.array([token]), np.array([block]))[0])
        for segment in ("00" * 8, "00" * 7 + "01", "ff" * 8)
        for layer in (0, 1, 200)
        for head in range(3)
        for token in (0, 1, 64, 100_000)
        for block in (0, 1, 1563)
    ]
    assert len(set(salts)) == len(salts)


def damage(path, offset: int, mask: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


@pytest.mark.parametrize("bit", [0, 517, 1023, 1024, 1087])  # the last two are in the checksum
def test_a_damaged_row_raises_an_error_that_names_it(tmp_path, bit):
    tier = DiskTier(tmp_path, temporary=False)
    keys, values = fill(tier, 200)
    layout = RowLayout(2, 32, 2)
    damage(row_file(tier), int(layout.offsets(np.array(1), np.array(1), np.array(6))) + bit // 8, 1 << bit % 8)
    named = rf"{row_file(tier).name}.*layer 0, KV head 1, token 70 "
    for read in (
        lambda: tier.gather(0, torch.tensor([0, 1]), torch.tensor([70, 70])),
        lambda: tier.read(0, 0, 200),
        lambda: tier.read(0, 70, 71),
    ):
        with pytest.raises(CorruptRowError, match=named):
            read()
    rows = torch.cat([keys, values], dim=-1)
    # its neighbours are intact
    assert torch.equal(tier.gather(0, torch.tensor([0, 1]), torch.tensor([70, 71])), rows[[0, 1], [70, 71]])
    assert torch.equal(torch.cat(tier.read(0, 71, 200), dim=-1), rows[:, 71:])
    tier.close()


def test_damage_in_the_padding_is_ignored(tmp_path):
    tier = DiskTier(tmp_path, temporary=False)
    keys, values = fill(tier, 64)
    damage(row_file(tier), os.path.getsize(row_file(tier)) - 1, 0xFF)
    assert torch.equal(everything(tier, 0, 2, 64), torch.cat([keys, values], dim=-1))
    tier.close()


def refilled(folder, tokens: int, seed: int) -> DiskTier:
    tier = DiskTier(folder, temporary=False)
    fill(tier, tokens, seed=seed)
    fill(tier, tokens, layer=1, seed=seed + 1)
    return tier


@pytest.mark.parametrize("other", ["session", "layer"])
def test_a_file_swapped_with_another_is_detected(tmp_path, other):
    mine = refilled(tmp_path / "a", 130, 1)
    theirs = refilled(tmp_path / "b", 130, 1)  # with the same rows
    source = row_file(theirs, 0) if other == "session" else row_file(mine, 1)
    target = row_file(mine, 0)
    target.write_bytes(source.read_bytes())
    for read in (lambda: mine.read(0, 0, 10), lambda: mine.gather(0, torch.tensor([0]), torch.tensor([3]))):
        with pytest.raises(CorruptRowError, match="KV head 0, token"):
            read()
    mine.close()
    theirs.close()


def test_blocks_swapped_within_a_file_are_detected(tmp_path):
    tier = refilled(tmp_path, 130, 1)
    path = row_file(tier)
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[half:] + data[:half])
    with pytest.raises(CorruptRowError, match="token 64 "):
        tier.gather(0, torch.tensor([1]), torch.tensor([64]))
    tier.close()


def test_a_hole_in_the_file_is_detected(tmp_path):
    tier = refilled(tmp_path, 130, 1)
    path = row_file(tier)
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)
    with pytest.raises(CorruptRowError):
        tier.read(0, 0, 1)
    tier.close()
