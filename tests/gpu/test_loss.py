"""The distillation loss on a CUDA device against its formula, dense and in fp64 on the CPU, in fp32 and bf16.

A failure means that students are trained on a wrong gradient on GPUs.
"""

from dataclasses import replace

import pytest
import torch

from minitron_mcore.distill import tiling
from minitron_mcore.parallel.megatron_patches import cpu_backend
from tests.gpu.loss_limits import BF16_GRADIENT, BF16_VALUE, GIVEN, limits
from tests.gpu.world import here
from tests.helpers import cached_teacher, kernel_cases, loss_cases
from tests.helpers.loss_cases import KINDS, relative_errors

pytestmark = pytest.mark.gpu

"""Twice what the CPU's tests allow."""


def compare(cases: dict[str, loss_cases.Case]) -> None:
    failed = {}
    for (name, case), result in zip(cases.items(), here(loss_cases.on_rank, list(cases.values())), strict=True):
        errors, (value, gradient) = relative_errors(case, [result]), limits(name, case)
        if not (max(errors[:4]) <= value and max(errors[4:]) <= gradient):
            failed[name] = errors
    assert not failed, failed


@pytest.mark.parametrize("kind", ["shared", *KINDS])
def test_fp32_equals_dense_fp64(kind):
    """Both public forms, temperature, masks, label loss, chunks, padding, large logits, several tiles."""
    if kind == "shared":
        return compare(loss_cases.CASES)
    compare({name: case for name, case in loss_cases.ALL.items() if name in shapes_of(kind)})


def shapes_of(kind: str) -> set[str]:
    return {f"{kind}, {shape}" for shape in loss_cases.shapes(KINDS[kind])}


def test_bf16_equals_dense_fp64():
    compare(loss_cases.BF16)


def test_kernels_equal_dense_fp64():
    """The Triton kernels by the real compiler: rows of several blocks, label loss, temperature, padding, bf16, no teacher."""
    found = tiling.kernels_for(torch.empty(0, device=device()))
    assert cpu_backend.is_cpu() or found.__name__.endswith("kernels")
    compare(kernel_cases.CASES)
    wide = replace(kernel_cases.ROW, tokens=67, vocab=32_000, padded=32_000, hidden=48, lm_weight=0.5)
    compare({"wide": wide, "wide, bf16": replace(wide, dtype=torch.bfloat16)})


def device() -> str:
    return "cpu" if cpu_backend.is_cpu() else "cuda"


def test_loss_on_given_entries_equals_dense_fp64():
    for (name, case), found in zip(GIVEN.items(), here(cached_teacher.loss_on_rank, list(GIVEN.values())), strict=True):
        bf16 = case.dtype == torch.bfloat16
        for n, (x, y) in enumerate(zip(found, case.reference(), strict=True)):
            limit = (2 * BF16_VALUE if n < 2 else 2 * BF16_GRADIENT) if bf16 else 2e-5
            assert (x.double() - y).abs().max() <= limit * y.abs().max(), (name, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_accumulation_fusion_adds_to_main_grad(dtype):
    limit = 1e-6 if dtype == torch.float32 else 1e-2  # unfused, the head's gradient is rounded to bf16 first
    for off, on in here(loss_cases.fusion_on_rank, dtype):
        for expected, found in zip(off, on, strict=True):
            assert found.dtype == torch.float32
            assert (found - expected).abs().max() <= limit * expected.abs().max()


def test_tied_embedding_gets_both_gradients():
    found = here(loss_cases.tied_on_rank, loss_cases.Case())
    expected = loss_cases.tied_reference(loss_cases.Case())
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_student_equal_to_teacher_has_no_loss_and_no_gradient():
    for name, (stats, *gradients) in zip(KINDS, here(loss_cases.same_model_on_rank, list(KINDS.values())), strict=True):
        assert abs(stats[0]) < 2e-6 and stats[2] > 1, name
        assert all(gradient.abs().max() < 2e-6 for gradient in gradients), name


def test_all_tokens_masked_give_exact_zeros():
    cases = {name: replace(case, masked=1.0, lm_weight=1.0) for name, case in KINDS.items()}
    for name, result in zip(cases, here(loss_cases.on_rank, list(cases.values())), strict=True):
        assert not any(tensor.any() for tensor in result), name
