"""The distillation loss over a vocabulary shared by CUDA devices: a failure means that students get a wrong gradient there."""

from dataclasses import replace

import pytest
import torch

from minitron_mcore.config.settings import ParallelConfig
from tests.gpu.loss_limits import BF16_GRADIENT, BF16_VALUE, GIVEN, limits
from tests.helpers import cached_teacher, loss_cases
from tests.multigpu.ranks import launch

pytestmark = pytest.mark.multigpu


def padded(cases: dict, tp: int) -> dict:
    """The same cases with a vocabulary that as many ranks can share."""
    return {name: replace(case, padded=-(-case.padded // tp) * tp) for name, case in cases.items()}


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_value_and_gradients_equal_dense_fp64(tp):
    """All divergences, both forms, in fp32 and bf16; then given entries."""
    cases, given = padded(loss_cases.ALL | bf16(), tp), padded(GIVEN, tp)
    ranks = launch(on_rank, tp, ParallelConfig(tensor=tp), list(cases.values()), list(given.values()))
    failed = {}
    for (name, case), *results in zip(cases.items(), *(rank[0] for rank in ranks), strict=True):
        errors, (value, gradient) = loss_cases.relative_errors(case, results), limits(name, case)
        if not (max(errors[:4]) <= value and max(errors[4:]) <= gradient):
            failed[name] = errors
    for (name, case), *results in zip(given.items(), *(rank[1] for rank in ranks), strict=True):
        ours = *results[0][:2], sum(r[2].double() for r in results), torch.cat([r[3] for r in results])
        exact = case.dtype == torch.float32
        for n, (x, y) in enumerate(zip(ours, case.reference(), strict=True)):
            limit = 2e-5 if exact else 2 * (BF16_VALUE if n < 2 else BF16_GRADIENT)
            if not (x.double() - y).abs().max() <= limit * y.abs().max():
                failed[f"given {name}, {n}"] = (x, y)
    assert not failed, failed


def bf16() -> dict:
    return {f"{name}, bf16": case for name, case in loss_cases.BF16.items()}


def on_rank(cases: list, given: list) -> tuple[list, list]:
    return loss_cases.on_rank(cases), cached_teacher.loss_on_rank(given)
