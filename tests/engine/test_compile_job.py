"""Compiled code on disk: made in a child process, loaded by later ones, rebuilt when damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import specache
from specache.config import Policy
from specache.engine import compile_cache, compile_job, compiled
from specache.engine.compile_cache import CompileCache
from specache.engine.compile_job import CompileJob
from specache.engine.compiled_layers import Variant
from specache.errors import ConfigError
from tests.tiny import llama, prompt

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
NEW = 12
ONE = [Variant(1, several=False)]
EXIT = """
import specache
from specache.engine import compile_job
from tests.tiny import llama, prompt
model = llama(num_hidden_layers=1)
specache.compile_decode(model, background=True)
specache.generate(model, prompt(80), max_new_tokens=2, min_new_tokens=2, do_sample=False)
print(compile_job._children[0].pid)
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache. No child that a test has started compiles for nobody afterwards."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path))
    yield tmp_path
    compile_job._end_children()


def answer(model: Any) -> tuple[list[int], int, str | None]:
    """Return an answer's tokens, its compiled steps, and why it was not compiled."""
    config = specache.SpeCacheConfig(residual=16, group_size=16, top_k=8)
    more = {"max_new_tokens": NEW, "min_new_tokens": NEW, "return_dict_in_generate": True}
    output = specache.generate(model, prompt(80), config=config, do_sample=True, top_k=5, **more)
    stats = output.past_key_values.stats()
    assert stats["decode_steps"] == NEW - 1
    return output.sequences[0].tolist(), stats["compiled_steps"], stats["compile_error"]


def cache_of(model: Any) -> CompileCache:
    cache = CompileCache.of(compile_cache.described_digest(model))
    assert cache is not None
    return cache


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the child has a low priority
def test_a_child_compiles_what_a_later_answer_loads_and_damage_is_compiled_again(folder):
    model = llama(num_hidden_layers=2)
    torch.manual_seed(3)
    eager = [answer(model)[0], answer(model)[0]]
    specache.compile_decode(model, background=True)
    torch.manual_seed(3)
    assert answer(model) == (eager[0], 0, None)
    children = list(compile_job._children)
    second = answer(model)
    assert compile_job._children == children  # no second one
    if not second[1]:  # the child is not done, as usual
        assert second == (eager[1], 0, None)
        assert not counters["stats"]
    children[-1].wait()
    torch.manual_seed(3)
    loaded = [answer(model) for _ in range(2)]
    assert loaded == [(tokens, NEW - 1, None) for tokens in eager]  # loading leaves the random state as it was
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1 and not counters["inductor"]["fxgraph_cache_miss"]

    other = llama(seed=1, num_hidden_layers=2)
    assert compiled.is_cached(other, Policy.ON_DEMAND, 1) and not compiled.is_cached(other, Policy.VERIFIED, 1)
    assert not compiled.is_cached(llama(num_hidden_layers=3), Policy.ON_DEMAND, 1)
    code = next((cache_of(other).folder / "inductor").rglob("*.so"))
    cut = code.read_bytes()[:-100]
    code.unlink()  # this process has it loaded
    code.write_bytes(cut)
    assert not compiled.is_cached(other, Policy.ON_DEMAND, 1) and not code.exists()
    specache.compile_decode(other, background=True)
    assert answer(other)[1:] == (0, None) and len(compile_job._children) == len(children) + 1


def test_two_processes_do_not_compile_the_same_model(folder):
    model = llama(num_hidden_layers=2)
    with cache_of(model).locked() as lock:
        assert lock is not None
        job = CompileJob.start(model, cache_of(model), ONE)
        assert job.finished and job.failure is None  # and it is asked again before the next answer


def test_a_child_that_fails_leaves_the_steps_eager_with_one_reason(folder, monkeypatch):
    model = llama(num_hidden_layers=2)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    specache.compile_decode(model, background=True)
    assert answer(model)[1:] == (0, None)
    compile_job._children[-1].wait()
    with pytest.warns(RuntimeWarning, match="stay eager: the compiling process ended with status 1"):
        answer(model)
    assert answer(model)[1:] == (0, "the compiling process ended with status 1")


def test_a_model_that_cannot_be_sent_to_a_child_stays_eager(folder):
    model = llama(num_hidden_layers=2)
    model.model.norm.of_the_user = lambda: None
    specache.compile_decode(model, background=True)
    with pytest.warns(RuntimeWarning, match="stay eager: .*lambda"):
        assert "lambda" in (answer(model)[2] or "")


def test_a_failure_is_remembered_and_counted(folder):
    model = llama(num_hidden_layers=2)
    cache_of(model).folder.mkdir(parents=True)
    cache_of(model).record_failure("SyntaxError: no")
    summary = compile_cache.summary()
    assert summary["models"] == 0 and summary["failures"] == ["SyntaxError: no"]
    specache.compile_decode(model, background=True)
    with pytest.warns(RuntimeWarning, match="SyntaxError: no"):
        assert answer(model)[2] == "SyntaxError: no"


def test_a_child_ends_with_the_process_that_started_it(folder):
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    with pytest.raises(ProcessLookupError):
        for _ in range(600):
            os.kill(int(done.stdout), 0)  # its parent has waited for it
            time.sleep(0.1)


def test_another_processor_or_version_has_a_folder_of_its_own(folder, monkeypatch):
    here = compile_cache.machine_folder()
    monkeypatch.setattr(compile_cache.machine, "processor", lambda: {"model name": "another", "flags": "avx2"})
    other = compile_cache.machine_folder()
    monkeypatch.setattr(specache, "__version__", "0.0")
    assert len({here, other, compile_cache.machine_folder()}) == 3


def test_weights_with_values_are_not_sent(folder):
    model = llama(num_hidden_layers=2, hidden_size=512, intermediate_size=2048)
    size = sum(weight.nbytes for weight in model.parameters())
    assert len(compile_job.pickled(model, ONE)) < size / 20


def test_background_needs_a_cpu_model_that_can_be_compiled(folder, monkeypatch):
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(ConfigError, match="no icpx"):
        specache.compile_decode(llama(), background=True)
