"""The C++ kernels' tests once more, under the address and undefined-behaviour sanitizers, in a
process of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specache.kernels.cpu import native
from tests.proofs import ROOT, Proof

TESTS = (
    *("tests/kernels/test_native.py", "tests/tiers/test_native_reads.py", "tests/linear/test_native_products.py"),
    *("tests/rows/test_native_hot_set.py", "tests/attention/test_copied_at_once.py"),
    *("tests/attention/test_read_at_once.py", "tests/engine/test_traced_layers.py", "tests/engine/test_layer_chain.py"),
)

# What runs no other code of the extension than the rest, or measures how near its numbers are.
LEFT_OUT = ("environment", "eager_layers", "changed_model", "other_families", "every_dtype", "score_errors")

CALLERS = (
    *("specache/kernels/cpu", "specache/linear/cpu_linear.py", "specache/engine/traced"),
    *("specache/tiers/disk/native_reads.py", "specache/tiers/disk/row_reads.py"),
)

# Loads the sanitized extension in the place of the installed one, then runs pytest.
RUNNER = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("specache._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["specache._native"] = module
from specache.kernels.cpu import native
assert native._native is module
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # it compiles the kernels once more: minutes, on a busy machine many
    pytest.mark.skipif(not native.instruction_sets(), reason="the C++ kernels are not built"),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux"),
]


def proofs() -> list[Proof]:
    """One per instruction set that this processor runs."""
    return [Proof(f"sanitizers-{isa}", ["csrc", *TESTS, *CALLERS]) for isa in native.instruction_sets()]


def test_the_kernels_are_clean_under_sanitizers(tmp_path):
    next((proof for proof in proofs() if not proof.is_known()), proofs()[0]).skip_if_known()
    run_under_sanitizers(tmp_path)


@pytest.mark.thorough
def test_the_kernels_are_clean_under_sanitizers_again(tmp_path):
    run_under_sanitizers(tmp_path)
    for proof in proofs():
        proof.write()


def run_under_sanitizers(tmp_path: Path) -> None:
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "CXX": "g++"}
    configure = ["cmake", "-S", ROOT / "csrc", "-B", tmp_path, "-GNinja", "-DSPECACHE_SANITIZE=ON"]
    configure.append(f"-DSPECACHE_SANITIZED_ISAS={';'.join(native.instruction_sets())}")
    subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], env=tools, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], env=tools, check=True, capture_output=True)
    (extension,) = tmp_path.glob("_native*.so")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            RUNNER,
            extension,
            *TESTS,
            "-k",
            " and ".join(f"not {name}" for name in LEFT_OUT),
        ],
        env={**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"},  # Python itself leaks
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
