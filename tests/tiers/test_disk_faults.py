"""A disk that is full, slow, failing or tampered with: a clear error or the right token, and no
leftovers.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache.errors import SlowTierError
from specache.kernels import dispatch
from specache.kernels.cpu import native
from specache.tiers.base import Fetch
from specache.tiers.disk import aligned_io, native_reads, tier_files
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.disk.probe import ReaderReport
from tests.cache.test_invariants import run, settings
from tests.tiers.faults import Steps, failing
from tests.tiers.tier_rows import everything, fill, nothing_left, random_rows, row_file
from tests.tiny import prompt

# Writing


def test_a_failed_write_leaves_the_tier_as_it_was(tmp_path, monkeypatch):
    tier = DiskTier(tmp_path)
    keys, values = fill(tier, 200)
    size, table, write = row_file(tier).stat().st_size, tier.extents(), aligned_io.write_at
    calls = []

    def full_after_one(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        return write(fd, data[:4096], offset) if len(calls) == 1 else failing(errno.ENOSPC)()

    monkeypatch.setattr(aligned_io, "write_at", full_after_one)
    with pytest.raises(SlowTierError, match=rf"{row_file(tier)} cannot be written: No space left on device. Free some space"):
        tier.write(0, 70, *random_rows(2, 200, 32, torch.bfloat16, 5))
    assert len(calls) == 2
    assert row_file(tier).stat().st_size == size
    assert tier.extents() == table
    assert torch.equal(everything(tier, 0, 2, 200), torch.cat([keys, values], dim=-1))
    monkeypatch.undo()
    more = random_rows(2, 200, 32, torch.bfloat16, 5)
    tier.write(0, 70, *more)
    assert torch.equal(everything(tier, 0, 2, 270)[:, 70:], torch.cat(more, dim=-1))
    tier.close()


def test_a_disk_that_fills_up_while_prefilling_leaves_the_cache_as_it_was(model, tmp_path, monkeypatch):
    config = settings(policy="verified", slow_tier=f"disk:{tmp_path}")
    expected = run(model, prompt(300), config)[0]
    with nothing_left(tmp_path), specache.SpeCache(model, config) as cache:
        specache.prefill(model, prompt(300)[:, :100], cache=cache)
        write, calls = aligned_io.write_at, []

        def full_later(*arguments: Any) -> int:
            calls.append(arguments)
            return write(*arguments) if len(calls) <= 4 else failing(errno.ENOSPC)()

        monkeypatch.setattr(aligned_io, "write_at", full_later)
        with pytest.raises(SlowTierError, match="No space left"):
            specache.generate(model, prompt(300), past_key_values=cache, max_new_tokens=40, do_sample=False)
        assert cache.get_seq_length() == 100
        monkeypatch.undo()
        tokens = specache.generate(model, prompt(300), past_key_values=cache, max_new_tokens=40, do_sample=False)
        assert tokens[0, 300:].tolist() == expected


def test_a_first_prefill_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    config = settings(slow_tier=f"disk:{tmp_path}")
    run(model, prompt(100), config, new=1)
    monkeypatch.setattr(aligned_io, "write_at", failing(errno.EIO))
    with nothing_left(tmp_path), pytest.raises(SlowTierError, match="Input/output error"):
        specache.generate(model, prompt(300), config=config, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("policy", ["verified", "speculative", "previous", "on-demand", "none"])
def test_a_step_on_a_full_disk_is_undone_and_can_be_repeated(model, tmp_path, monkeypatch, policy):
    """The rows of a block are written with its last token; steps before that need no space."""
    config = settings(policy=policy, slow_tier=f"disk:{tmp_path}")
    undisturbed = Steps(model, config, 120)
    expected = [undisturbed.step(i) for i in range(40)]
    undisturbed.cache.close()

    disturbed = Steps(model, config, 120)
    failed = 0
    for i in range(40):
        write, layers = aligned_io.write_at, []

        def full_in_the_second_layer(*arguments: Any, write: Any = write, layers: list[Any] = layers) -> int:
            layers.append(arguments)
            return write(*arguments) if len(layers) == 1 else failing(errno.ENOSPC)()

        with monkeypatch.context() as patch:
            patch.setattr(aligned_io, "write_at", full_in_the_second_layer)
            try:
                logits = disturbed.step(i)
            except SlowTierError:
                failed += 1
                assert disturbed.cache.get_seq_length() == 120 + i
                logits = None
        if logits is None:
            logits = disturbed.step(i)
        assert torch.equal(logits, expected[i])
    assert failed == 1
    disturbed.cache.close()
    assert not list(tmp_path.iterdir())


def test_a_prefill_onto_a_full_file_system_fails_cleanly(model, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        config = settings(slow_tier=f"disk:{folder}")
        fits = run(model, prompt(200), config)
        assert fits[0] == run(model, prompt(200), settings(slow_tier="ram"))[0]
        with pytest.raises(SlowTierError, match=f"{folder}.*No space left on device"):
            run(model, prompt(1800), config)
        assert not list(folder.iterdir())
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("where", ["below a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_refused_before_prefill(model, tmp_path, where):
    prefilled: list[int] = []
    folder = tmp_path / "x"
    if where == "below a file":
        folder.write_text("not a folder")
        folder = folder / "rows"
    else:
        folder.mkdir()
        read_only = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "none", str(folder)]
        if subprocess.run(read_only, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(SlowTierError, match=f"{folder} cannot be written: .* Choose a folder that you may write"):
            specache.generate(
                model,
                prompt(100),
                config=settings(slow_tier=f"disk:{folder}"),
                max_new_tokens=2,
                progress=lambda done, total: prefilled.append(done),
            )
        assert not prefilled
    finally:
        if where == "read-only":
            subprocess.run(["umount", str(folder)], check=True)


# Reading


@pytest.mark.usefixtures("plain_reads")
@pytest.mark.parametrize("how", ["short", "slow"])
def test_short_and_slow_reads_change_no_token(model, tmp_path, monkeypatch, how):
    expected = run(model, prompt(230), settings(policy="verified", slow_tier="ram"))
    read, disturbed = aligned_io.read_at, []

    def short(fd: int, into: memoryview, offset: int) -> int:
        disturbed.append(offset)
        return read(fd, into[: max(1, len(into) // 2)], offset)

    def slow(fd: int, into: memoryview, offset: int) -> int:
        disturbed.append(offset)
        time.sleep(0.002)
        return read(fd, into, offset)

    monkeypatch.setattr(aligned_io, "read_at", {"short": short, "slow": slow}[how])
    tokens, logits, stats = run(model, prompt(230), settings(policy="verified", slow_tier=f"disk:{tmp_path}"))
    assert disturbed
    assert tokens == expected[0]
    assert torch.equal(logits, expected[1])
    if how == "slow":
        assert stats["read_s"] > 0.1
        assert stats["waits"] > 0


def in_background() -> bool:
    return threading.current_thread().name.startswith("specache-prefetch")


def wait_for_reads_ahead(cache: specache.SpeCache) -> None:
    """Wait until threads have done the reads that the last step gave them.

    The next step does itself what none has begun.
    """
    for layer in cache.sequences[0].layers.values():
        fetch = layer.row_fetcher._prefetch
        if fetch is not None:
            wait([fetch._future])


@pytest.mark.usefixtures("plain_reads")
@pytest.mark.parametrize("policy", ["verified", "speculative", "previous"])
def test_a_failed_background_read_raises_once_in_the_next_step(model, tmp_path, monkeypatch, policy):
    config = settings(policy=policy, slow_tier=f"disk:{tmp_path}", hot_set=0.0, top_k=16)
    undisturbed = Steps(model, config, 230)
    expected = [undisturbed.step(i) for i in range(12)]
    undisturbed.cache.close()

    read = aligned_io.read_at
    broken = False
    raised: list[SlowTierError] = []

    def failing_in_background(*arguments: Any) -> int:
        return failing(errno.EIO)() if broken and in_background() else read(*arguments)

    # reads that a step starts take no thread
    monkeypatch.setattr(DiskTier, "begin", lambda tier, *pairs: Fetch(partial(tier.gather, *pairs)))
    monkeypatch.setattr(aligned_io, "read_at", failing_in_background)
    disturbed = Steps(model, config, 230)
    broken = True
    for i in range(12):  # a step may find the whole draft selection in the hot set, and submit nothing
        wait_for_reads_ahead(disturbed.cache)
        try:
            logits = disturbed.step(i)
        except SlowTierError as error:
            raised.append(error)
            assert disturbed.cache.get_seq_length() == 230 + i
            broken = False
            logits = disturbed.step(i)  # though every layer's read had failed
            broken = True
        assert torch.equal(logits, expected[i])
    assert raised
    for error in raised:
        assert re.match(r"Reading ahead in layer \d+ failed. .*KV head \d, token \d+.*Input/output error", str(error))
        assert isinstance(error.__cause__, SlowTierError)
        assert isinstance(error.__cause__.__cause__, OSError)
    disturbed.cache.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("plain_reads")
def test_a_read_that_fails_in_the_foreground_is_undone_in_every_layer(model, tmp_path, monkeypatch):
    """Also in a step that quantises a group, while nothing can be read."""
    config = settings(policy="on-demand", slow_tier=f"disk:{tmp_path}", hot_set=0.0, top_k=32)
    undisturbed = Steps(model, config, 230)
    expected = [undisturbed.step(i) for i in range(40)]
    undisturbed.cache.close()
    disturbed = Steps(model, config, 230)
    read = aligned_io.read_at
    failed: set[tuple[int, str]] = set()
    for i in range(40):
        for layer in ("L000", "L002", "none"):

            def fails(fd: int, into: memoryview, offset: int, layer: str = layer) -> int:
                return failing(errno.EIO)() if layer in os.readlink(f"/proc/self/fd/{fd}") else read(fd, into, offset)

            with monkeypatch.context() as patch:
                patch.setattr(aligned_io, "read_at", fails)
                try:
                    logits = disturbed.step(i)
                    break
                except SlowTierError:
                    failed.add((i, layer))
                    assert disturbed.cache.get_seq_length() == 230 + i
        assert torch.equal(logits, expected[i])
    pending_group_tokens = [i for i in range(40) if (230 + i + 1 - 16) % 16 == 0]
    assert {(i, layer) for i in pending_group_tokens for layer in ("L000", "L002")} <= failed
    disturbed.cache.close()


@pytest.mark.usefixtures("plain_reads")
@pytest.mark.skipif(not native.instruction_sets(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_in_several_calls_that_fails_with_reads_in_flight_can_be_repeated(model, tmp_path, monkeypatch, error):
    config = settings(policy="verified", slow_tier=f"disk:{tmp_path}", hot_set=0.0, top_k=16)
    undisturbed = Steps(model, config, 230)
    expected = [undisturbed.step(i) for i in range(8)]
    undisturbed.cache.close()
    attend = native.NativeLayerStep.attend_low_bit
    began: list[bool] = []
    calls: list[int] = []

    def fails_in_the_second_layer(step: native.NativeLayerStep, positions: torch.Tensor) -> None:
        layer = disturbed.cache.sequences[0].layers[len(calls) % 3]
        began.append(layer.row_fetcher._missing is not None)
        calls.append(1)
        if len(calls) == 2:
            raise error("while they are")
        attend(step, positions)

    with nothing_left(tmp_path):
        disturbed = Steps(model, config, 230)
        for i in range(8):
            calls.clear()
            with monkeypatch.context() as patch:
                patch.setattr(native.NativeLayerStep, "attend_low_bit", fails_in_the_second_layer)
                with pytest.raises(error, match="while they are"):
                    disturbed.step(i)
            assert torch.equal(disturbed.step(i), expected[i])
        disturbed.cache.close()
    assert any(began[1::2])


@pytest.mark.skipif(not native.instruction_sets(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_in_one_call_that_fails_with_reads_in_flight_can_be_repeated(model, tmp_path, monkeypatch, error):
    monkeypatch.setattr(tier_files, "report_for", lambda folder: ReaderReport("io_uring", False, 4096))
    config = settings(policy="verified", slow_tier=f"disk:{tmp_path}", hot_set=0.0, top_k=16)
    try:
        undisturbed = Steps(model, config, 230)
    except SlowTierError as missing:
        pytest.skip(str(missing))
    expected = [undisturbed.step(i) for i in range(8)]
    undisturbed.cache.close()
    decode = dispatch.decode_fetched
    began: list[bool] = []
    calls: list[int] = []

    def fails_in_the_second_layer(*arguments: Any) -> Any:
        step = decode(*arguments)
        reads = disturbed.cache.sequences[0].layers[len(calls)].row_fetcher._reads
        began.append(reads.native.reading_ahead)
        calls.append(1)
        if len(calls) == 2:
            raise error("while they are")
        return step

    with nothing_left(tmp_path):
        disturbed = Steps(model, config, 230)
        for i in range(8):
            calls.clear()
            with monkeypatch.context() as patch:
                patch.setattr(dispatch, "decode_fetched", fails_in_the_second_layer)
                with pytest.raises(error, match="while they are"):
                    disturbed.step(i)
            assert disturbed.cache.get_seq_length() == 230 + i
            assert torch.equal(disturbed.step(i), expected[i])
        disturbed.cache.close()
    assert any(began[1::2])


@pytest.mark.skipif(not native.instruction_sets(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("policy", ["verified", "on-demand"])
def test_a_file_that_is_cut_short_fails_a_step_in_one_call_which_can_be_repeated(model, tmp_path, monkeypatch, policy):
    monkeypatch.setattr(tier_files, "report_for", lambda folder: ReaderReport("io_uring", False, 4096))
    config = settings(policy=policy, slow_tier=f"disk:{tmp_path}", hot_set=0.0, top_k=16)
    try:
        undisturbed = Steps(model, config, 230)
    except SlowTierError as missing:
        pytest.skip(str(missing))
    expected = [undisturbed.step(i) for i in range(8)]
    undisturbed.cache.close()
    disturbed = Steps(model, config, 230)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.rows")}
    failed = 0
    for i in range(8):
        for path in files:
            os.truncate(path, 0)
        try:
            logits = disturbed.step(i)
        except SlowTierError as error:
            assert re.search(r"KV head \d, token \d+ cannot be read: the file ends too early", str(error))
            assert disturbed.cache.get_seq_length() == 230 + i
            failed += 1
            logits = None
        for path, data in files.items():
            path.write_bytes(data)
        assert torch.equal(disturbed.step(i) if logits is None else logits, expected[i])
    assert failed
    disturbed.cache.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("plain_reads")
def test_a_truncation_that_cannot_read_its_block_changes_nothing(model, tmp_path, monkeypatch):
    config = settings(policy="verified", slow_tier=f"disk:{tmp_path}")
    longer = torch.cat([prompt(300)[:, :150], prompt(60, 3)], dim=1)
    expected = run(model, longer, config)[0]
    with specache.SpeCache(model, config) as cache:
        specache.prefill(model, prompt(300), cache=cache)
        monkeypatch.setattr(aligned_io, "read_at", failing(errno.EIO))
        with pytest.raises(SlowTierError, match="Input/output error"):
            specache.prefill(model, longer, cache=cache)
        assert {layer.length for layer in cache.sequences[0].layers.values()} == {300}
        assert cache.get_seq_length() == 300
        monkeypatch.undo()
        tokens = specache.generate(model, longer, past_key_values=cache, max_new_tokens=40, do_sample=False)
        assert tokens[0, longer.shape[1] :].tolist() == expected


def test_a_failed_prefill_that_cannot_be_undone_empties_the_sequence(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tier_files, "report_for", lambda folder: ReaderReport("buffered", False, 4096))
    config = settings(policy="verified", slow_tier=f"disk:{tmp_path}", residual=64)
    expected = run(model, prompt(600), config)[0]
    with specache.SpeCache(model, config) as cache:
        specache.prefill(model, prompt(600)[:, :300], cache=cache)
        write, calls = aligned_io.write_at, []

        def dies(*arguments: Any) -> int:
            calls.append(arguments)
            if len(calls) <= 6:
                return write(*arguments)
            monkeypatch.setattr(aligned_io, "read_at", failing(errno.EIO))
            return failing(errno.EIO)()

        monkeypatch.setattr(aligned_io, "write_at", dies)
        with pytest.raises(SlowTierError, match="cannot be written"):
            specache.prefill(model, prompt(600), cache=cache)
        assert cache.get_seq_length() == 0
        monkeypatch.setattr(aligned_io, "write_at", write)
        monkeypatch.undo()
        tokens = specache.generate(model, prompt(600), past_key_values=cache, max_new_tokens=40, do_sample=False)
        assert tokens[0, 600:].tolist() == expected


def test_an_error_in_the_middle_of_decoding_leaves_no_files_or_threads(model, tmp_path, monkeypatch):
    config = settings(policy="verified", slow_tier=f"disk:{tmp_path}")
    run(model, prompt(100), config, new=1)
    calls = []
    with nothing_left(tmp_path):
        read = native_reads.NativeRows.read

        def fails_later(*arguments: Any) -> bool:
            calls.append(1)
            return len(calls) < 20 and read(*arguments)

        for name in ("gather", "begin", "new_reads"):  # nothing but plain batches
            monkeypatch.setattr(native_reads.NativeRows, name, lambda *arguments: None)
        monkeypatch.setattr(native_reads.NativeRows, "read", fails_later)
        plain = aligned_io.read_at
        monkeypatch.setattr(
            aligned_io, "read_at", lambda *arguments: plain(*arguments) if len(calls) < 20 else failing(errno.EIO)()
        )
        monkeypatch.setattr(tier_files, "report_for", lambda folder: ReaderReport("io_uring", False, 4096))
        try:
            with pytest.raises(SlowTierError):
                specache.generate(model, prompt(230), config=config, max_new_tokens=60, do_sample=False)
        except OSError as error:
            pytest.skip(f"no io_uring here: {error}")


@pytest.fixture(autouse=True)
def no_leftover_mounts(tmp_path: Path) -> Iterator[None]:
    yield
    assert not any(os.path.ismount(path) for path in tmp_path.iterdir())
