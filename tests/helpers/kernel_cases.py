"""Cases of the loss that the Triton kernels compute, and their results in Triton's interpreter."""

import os
import sys
from dataclasses import replace

import torch

from minitron_mcore.distill import tiling
from tests.helpers import cached_teacher, loss_cases
from tests.helpers.loss_cases import Case

ROW = Case(11, 9001, 9004)
"""Three blocks of a row at TP 1, two at TP 2; none ends with one."""


MIXED = dict(kd_weight=0.7, lm_weight=0.3, masked=0.3, chunk_tokens=4)


CASES = {
    "kl": ROW,
    "mixed, masked": replace(ROW, **MIXED),
    "temperature": replace(ROW, temperature=2.0),
    "temperature, mixed, masked": replace(ROW, temperature=2.0, **MIXED),
    "large logits": replace(ROW, spread=30.0, lm_weight=0.5),
    "lm only": replace(ROW, kd_weight=0.0, lm_weight=1.0),
    "a rank of padding only": Case(vocab=100, padded=192, lm_weight=0.5, temperature=3.0),
    "bf16": replace(ROW, dtype=torch.bfloat16, **MIXED),
}


def interpreted(cases: list[Case], given: list[cached_teacher.Case]) -> tuple[list, list]:
    """This rank's results of both kinds of cases. The interpreter has to be chosen before triton is imported, which torch does."""
    os.environ["TRITON_INTERPRET"] = "1"
    assert "minitron_mcore.distill.kernels" not in sys.modules
    for name in [name for name in sys.modules if name.startswith("triton") and "._C" not in name]:
        del sys.modules[name]
    kernels = tiling.kernels_for(torch.empty(0))
    assert type(kernels._sums).__name__ == "InterpretedFunction"
    return loss_cases.on_rank(cases), cached_teacher.loss_on_rank(given)
