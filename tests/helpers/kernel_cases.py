"""Cases of the loss that the Triton kernels compute."""

from dataclasses import replace

import torch

from tests.helpers.loss_cases import Case

ROW = Case(11, 9001, 9004)


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
