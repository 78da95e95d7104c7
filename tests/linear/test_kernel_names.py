"""The products of every weight format are named, with what they depend on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from specache import linear
from specache.bench.shapes import Weights
from specache.linear import cpu_linear


def test_every_number_format_has_a_name():
    names = linear.kernel_names()
    assert set(names) == {str(weights) for weights in Weights} and all(names.values())


@pytest.mark.parametrize("native", [True, False])
def test_widened_products_are_named_where_a_processor_has_none(monkeypatch, native):
    monkeypatch.setattr(cpu_linear, "multiplies_natively", lambda dtype: native)
    names = linear.kernel_names()
    assert all(("widened to float32" in names[weights]) is not native for weights in ("bf16", "fp16"))


def test_the_package_is_imported_without_pytorch():
    program = "import sys, specache.linear.weight_format; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
