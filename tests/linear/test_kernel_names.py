"""The products of every weight format are named, with what they depend on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from specache import linear
from specache.bench.shapes import Weights
from specache.linear import cpu_linear, native_products
from specache.platform import private_torch


def test_every_number_format_has_a_name():
    names = linear.kernel_names()
    assert set(names) == {str(weights) for weights in Weights} and all(names.values())


@pytest.mark.parametrize("native", [True, False])
def test_widened_products_are_named_where_a_processor_has_none(monkeypatch, native):
    monkeypatch.setattr(cpu_linear, "multiplies_natively", lambda dtype: native)
    names = linear.kernel_names()
    assert all(("widened to float32" in names[weights]) is not native for weights in ("bf16", "fp16"))


def test_products_of_our_own_name_their_instruction_set(monkeypatch):
    monkeypatch.setattr(native_products, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(private_torch, "has_matrix_registers", lambda: True)
    names = linear.kernel_names()
    assert all(name.startswith("avx2") for name in names.values()) and "formed" in names["int8"]
    monkeypatch.setattr(native_products, "instruction_set", lambda: None)
    assert not any("avx2" in name for name in linear.kernel_names().values())


def test_the_package_is_imported_without_pytorch():
    program = "import sys, specache.linear.weight_format; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
