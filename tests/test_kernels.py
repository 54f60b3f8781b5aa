"""The Triton kernels of the loss: a failure means that students are trained on a wrong gradient where there is a GPU.

Triton's interpreter runs them here, block by block, in a process of its own: it has to be chosen before triton is imported.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minitron_mcore.config import Divergence
from minitron_mcore.distill import kernels, tiles
from minitron_mcore.distill.divergences import make
from tests import test_losses
from tests.test_losses import Case

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
KINDS = {
    "reverse_kl": Case(divergence=Divergence.reverse_kl),
    "jsd": Case(divergence=Divergence.jsd),
    "jsd, beta 0.2": Case(divergence=Divergence.jsd, jsd_beta=0.2),
    "mse": Case(divergence=Divergence.mse),
    "cosine": Case(divergence=Divergence.cosine),
}
for name, kind in KINDS.items():
    kind = {field: getattr(kind, field) for field in ("divergence", "jsd_beta")}
    scaled = {} if name in ("mse", "cosine") else {"temperature": 2.0}
    CASES |= {
        name: replace(ROW, **kind),
        f"{name}, mixed, masked": replace(ROW, **kind, **MIXED),
        f"{name}, temperature, mixed, masked": replace(ROW, **kind, **MIXED, **scaled),
        f"{name}, large logits": replace(ROW, **kind, spread=10.0, lm_weight=0.5),
        f"{name}, a rank of padding only": Case(vocab=100, padded=192, lm_weight=0.5, **kind, **scaled),
        f"{name}, bf16": replace(ROW, dtype=torch.bfloat16, **kind, **MIXED),
    }


def on_rank(cases: list[Case]) -> list:
    for divergence in Divergence:
        assert tiles.kernels_for(torch.empty(0), make(divergence, 1, 0.5, None, 1.0)) is kernels
    return test_losses.on_rank(cases)


def interpret(file: str) -> None:
    torch.save({tp: test_losses.run_all(on_rank, tp, CASES) for tp in (1, 2)}, file)


def test_value_and_gradients_equal_dense_fp64(tmp_path):
    code = f"from tests import test_kernels; test_kernels.interpret({str(tmp_path / 'results')!r})"
    environment, root = os.environ | {"TRITON_INTERPRET": "1"}, Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, check=True)
    for results in torch.load(tmp_path / "results").values():
        for name, case in CASES.items():
            errors = test_losses.relative_errors(case, results[name])
            rough = 2 if name.startswith("reverse_kl") else 1  # as in test_losses.test_bf16
            value, gradient = (5e-4 * rough, 1e-2 * rough) if case.dtype == torch.bfloat16 else (1e-5, 1e-5)
            if name.startswith("jsd") and name.endswith("large logits"):
                gradient = 2 * test_losses.dense_error(
                    case
                )  # they vanish, and lose as much in a dense fp32 computation
            assert max(errors[:4]) <= value and max(errors[4:]) <= gradient, (name, errors)


def test_compiles_for_an_h100():
    """Without one: the interpreter takes what the compiler would refuse. fp64 is slow there, and has no place in a row."""
    types = {"student": "*bf16", "teacher": "*bf16", "place": "*i64", "inverse_t": "fp32", "beta": "fp32"}
    types |= dict.fromkeys(("out", "largest", "scale", "hit", "factors", "shift"), "*fp32")
    blocks = {kernels._read: kernels.READ_BLOCK, kernels._write: kernels.WRITE_BLOCK}
    pairs = [*itertools.product(blocks, kernels.KINDS.values()), (kernels._read_again, kernels.JSD)]
    for kernel, kind in pairs:
        names, constants = kernel.arg_names, {"KIND": kind.value, "HAS_TEACHER": True, "WARM": True}
        constants = {name: value for name, value in constants.items() if name in names}
        constants["BLOCK"] = blocks.get(kernel, kernels.WRITE_BLOCK)
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert "f64" not in compiled.asm["ptx"]
