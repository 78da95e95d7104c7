"""PyTorch's private operations: which the installed release has, and the fallbacks without them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import specache
from specache.attention.dense import attend_part
from specache.kernels.types import AttentionParams
from specache.platform import private_torch
from tests.tiny import llama, prompt

PACKAGE = Path(specache.__file__).parent
PRIVATE = re.compile(r"torch\.(?:\w+\.)*_[a-zA-Z]\w*")


@pytest.fixture
def without(monkeypatch):
    """Make the installed PyTorch lack some operations."""

    removed: set[str] = set()
    find = private_torch.find

    def remove(*paths: str) -> None:
        assert set(paths) <= private_torch.FALLBACKS.keys()
        removed.update(paths)

    monkeypatch.setattr(private_torch, "find", lambda path: None if path in removed else find(path))
    return remove


def test_the_installed_pytorch_has_all_of_them():
    """A release that drops one uses its fallback. This test tells a maintainer which."""
    assert private_torch.missing_operations() == []


def test_a_missing_operation_is_none_and_listed(without):
    without("ops.mkldnn._is_mkldnn_bf16_supported", "_dynamo.mark_static")
    assert private_torch.find("ops.mkldnn._is_mkldnn_bf16_supported") is None
    assert private_torch.missing_operations() == ["ops.mkldnn._is_mkldnn_bf16_supported", "_dynamo.mark_static"]


def test_an_unknown_operation_is_not_found(monkeypatch):
    for path in ("ops.aten._no_such_operation", "_no_such_module.name", "cpu._no_such_function"):
        monkeypatch.setitem(private_torch.FALLBACKS, path, "nothing")
        assert private_torch.find(path) is None


def test_no_other_file_calls_a_private_operation():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        code = "\n".join(line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines())
        if path.name != "private_torch.py" and (uses := PRIVATE.findall(code)):
            found[str(path.relative_to(PACKAGE))] = uses
    assert found == {}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_the_fused_kernel_is_the_same_to_rounding(without, dtype, causal):
    generator = torch.Generator().manual_seed(3)
    query, keys, values = (torch.randn(heads, 70, 16, generator=generator).to(dtype) for heads in (4, 2, 2))
    params = AttentionParams(scaling=0.25)
    fused = attend_part(query, keys, values, params, causal=causal)
    without("ops.aten._scaled_dot_product_flash_attention_for_cpu")
    plain = attend_part(query, keys, values, params, causal=causal)
    for mine, theirs in zip(plain, fused, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 if dtype is torch.float32 else 0.03)


def test_attention_on_a_gpu_works_without_pytorchs_flash_attention(without):
    without("ops.aten._scaled_dot_product_flash_attention")
    query, keys, values = torch.randn(3, 1, 2, 5, 16).unbind(0)
    assert private_torch.flash_attention_cuda(query, keys, values, True, 0.25) is None


@pytest.mark.parametrize("policy", ["full", "verified"])
def test_a_model_answers_the_same_without_the_fused_kernel(without, policy):
    model, ids = llama(), prompt(150)
    without("ops.aten._scaled_dot_product_flash_attention_for_cpu")
    config = specache.SpeCacheConfig(policy=policy, residual=16, group_size=16, top_k=10**6, slow_tier="ram")
    out = specache.generate(model, ids, config=config, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_unknown_processor_counts_as_without_16_bit_products(without, dtype):
    without("ops.mkldnn._is_mkldnn_bf16_supported", "ops.mkldnn._is_mkldnn_fp16_supported")
    assert not private_torch.multiplies_natively(dtype)


def test_bfloat16_support_falls_back_to_onednn(without, monkeypatch):
    without("cpu._is_avx512_bf16_supported", "cpu._is_amx_tile_supported")
    for known in (True, False):
        with monkeypatch.context() as patch:
            answers = {"ops.mkldnn._is_mkldnn_bf16_supported": lambda known=known: known}
            patch.setattr(private_torch, "find", answers.get)
            assert private_torch.has_bfloat16_instructions() is known
    without("ops.mkldnn._is_mkldnn_bf16_supported")
    assert not private_torch.has_bfloat16_instructions()


@pytest.mark.parametrize(
    ("processor", "instructions", "expected"),
    [("x86_64", True, True), ("x86_64", False, False), ("AMD64", False, False), ("x86_64", None, True), ("aarch64", False, True)],
)
def test_products_that_onednn_emulates_do_not_count_as_native(monkeypatch, processor, instructions, expected):
    answers = {"ops.mkldnn._is_mkldnn_bf16_supported": lambda: True, "ops.mkldnn._is_mkldnn_fp16_supported": lambda: True}
    if instructions is not None:
        answers["cpu._is_avx512_bf16_supported"] = lambda: instructions
    monkeypatch.setattr(private_torch, "find", answers.get)
    monkeypatch.setattr(private_torch.platform, "machine", lambda: processor)
    assert private_torch.multiplies_natively(torch.bfloat16) is expected
    assert private_torch.multiplies_natively(torch.float16)


def test_compiler_hints_are_omitted_if_unsupported(without):
    without("_dynamo.mark_static", "_dynamo.maybe_mark_dynamic", "_dynamo.exc.TorchDynamoException")
    tensor = torch.zeros(2, 3)
    private_torch.fix_size(tensor, 1)
    private_torch.free_size(tensor, 0)
    assert not any("dynamo" in name for name in vars(tensor))
    assert private_torch.compiler_error() is RuntimeError


def test_the_compiler_gets_no_options_if_it_lists_none(without):
    assert private_torch.known_options({"size_asserts": False, "no such option": 1}) == {"size_asserts": False}
    without("_inductor.list_options")
    assert private_torch.known_options({"size_asserts": False}) == {}


def test_the_compilers_folder_is_set_and_restored_without_its_private_function(without, monkeypatch, tmp_path):
    without("_inductor.utils.clear_caches")
    for before in (None, "elsewhere"):
        monkeypatch.delenv(private_torch.COMPILER_FOLDER, raising=False)
        if before is not None:
            monkeypatch.setenv(private_torch.COMPILER_FOLDER, before)
        with private_torch.compiler_folder(str(tmp_path)):
            assert os.environ[private_torch.COMPILER_FOLDER] == str(tmp_path)
        assert os.environ.get(private_torch.COMPILER_FOLDER) == before


def test_hooks_of_all_modules_are_found_or_there_are_taken_to_be_none(without):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert len(private_torch.global_hooks()) == 1
        without("nn.modules.module._global_forward_pre_hooks", "nn.modules.module._global_forward_hooks")
        assert private_torch.global_hooks() == []
    finally:
        handle.remove()
    assert private_torch.global_hooks() == []
