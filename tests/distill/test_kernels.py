"""The Triton kernels of the loss: a failure means that students are trained on a wrong gradient where there is a GPU.

Triton's interpreter runs them here, block by block.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.distill import kernels
from minitron_mcore.testing import on_ranks
from tests.helpers import cached_teacher, kernel_cases, loss_cases
from tests.helpers.kernel_cases import MIXED, ROW, interpreted
from tests.helpers.loss_cases import Case

CASES = dict(kernel_cases.CASES)
for name in ("reverse_kl", "jsd", "jsd, beta 0.2", "mse", "cosine", "top 20"):
    kind = loss_cases.KINDS[name]
    kind = {field: getattr(kind, field) for field in ("divergence", "jsd_beta", "top_k")}
    scaled = {} if name in ("mse", "cosine") else {"temperature": 2.0}
    CASES |= {
        name: replace(ROW, **kind),
        f"{name}, mixed, masked": replace(ROW, **kind, **MIXED),
        f"{name}, temperature, mixed, masked": replace(ROW, **kind, **MIXED, **scaled),
        f"{name}, large logits": replace(ROW, **kind, spread=10.0, lm_weight=0.5),
        f"{name}, a rank of padding only": Case(vocab=100, padded=192, lm_weight=0.5, **kind, **scaled),
        f"{name}, bf16": replace(ROW, dtype=torch.bfloat16, **kind, **MIXED),
    }
CASES |= {
    "top 1": replace(ROW, top_k=1, temperature=2.0, **MIXED),
    "top 70 of 100": Case(vocab=100, padded=102, top_k=70, temperature=2.0, **MIXED),
    "top 99 of 100, far above the last": Case(vocab=100, padded=102, top_k=99, spread=60.0, lm_weight=0.5),
}
GIVEN = {"bf16": cached_teacher.Case(dtype=torch.bfloat16), "a long row": cached_teacher.Case(vocab=9001, padded=9004)}
GIVEN |= cached_teacher.CASES
"""Losses on a teacher's largest entries."""
for part in (CASES, GIVEN):
    # Two chunks: the interpreter takes long. Rounding to bf16 is held over more tokens.
    part |= {name: replace(case, tokens=5) for name, case in part.items() if case.dtype == torch.float32}


def chosen(some: bool) -> tuple[dict[str, Case], dict[str, cached_teacher.Case]]:
    """All cases, or one of each divergence and three of forward KL."""
    names = [name for name in CASES if name.endswith("mixed, masked") and "temperature" not in name]
    names += ["lm only", "bf16", "a rank of padding only"]
    return ({name: CASES[name] for name in names}, {"20": GIVEN["20"]}) if some else (CASES, GIVEN)


@pytest.mark.default_cases("some")
@pytest.mark.parametrize("some", [True, False], ids=["some", "all"])
def test_value_and_gradients_equal_dense_fp64(some):
    """At TP 2; all cases at TP 1 too."""
    cases, given = chosen(some)
    for tp in (2,) if some else (1, 2):
        ranks = on_ranks(interpreted, tp, ParallelConfig(tensor=tp), [*cases.values()], [*given.values()])
        for (name, case), *results in zip(cases.items(), *(rank[0] for rank in ranks), strict=True):
            errors = loss_cases.relative_errors(case, results)
            rough = 2 if name.startswith(("reverse_kl", "top")) else 1  # as in test_losses.test_bf16
            value, gradient = (5e-4 * rough, 1e-2 * rough) if case.dtype == torch.bfloat16 else (1e-5, 1e-5)
            if name.startswith("jsd") and name.endswith("large logits"):
                gradient = 2 * loss_cases.dense_error(case)  # they vanish, and lose as much in a dense fp32 computation
            assert max(errors[:4]) <= value and max(errors[4:]) <= gradient, (name, errors)
        for (name, case), *results in zip(given.items(), *(rank[1] for rank in ranks), strict=True):
            value, gradient = (1e-3, 2e-2) if case.dtype == torch.bfloat16 else (1e-5, 1e-5)
            limits = zip(
                cached_teacher.joined(results), case.reference(), (value, value, gradient, gradient), strict=True
            )
            assert all((x.double() - y).abs().max() <= limit * y.abs().max() for x, y, limit in limits), name


def test_compiles_for_an_h100():
    """Without one: the interpreter takes what the compiler would refuse. fp64 is slow there, and has no place in a row."""
    types = {"student": "*bf16", "teacher": "*bf16", "label_ids": "*i64", "inverse_t": "fp32", "beta": "fp32"}
    types |= dict.fromkeys(("out", "values", "log_sum_exp"), "*fp32")
    kinds = dict.fromkeys(kind.value for kind in (*kernels.KINDS.values(), kernels.NO_TEACHER))
    pairs = [*itertools.product((kernels._sums, kernels._gradient), kinds), (kernels._second_sums, None)]
    pairs.remove((kernels._gradient, kernels.TOP_K.value))
    for kernel, kind in pairs:
        names, constants = kernel.arg_names, {"KIND": kind, "HAS_TEMPERATURE": True}
        constants = {name: value for name, value in constants.items() if name in names}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert "f64" not in compiled.asm["ptx"]
