"""The Triton kernels of the loss: a failure means that students are trained on a wrong gradient where there is a GPU.

Triton's interpreter runs them here, block by block, in a process of its own: it has to be chosen before triton is imported.
"""

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


def on_rank(cases: list[Case]) -> list:
    assert tiles.kernels_for(torch.empty(0), make(Divergence.forward_kl, 1, 0.5, None, 1.0)) is kernels
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
            value, gradient = (5e-4, 1e-2) if case.dtype == torch.bfloat16 else (1e-5, 1e-5)
            assert max(errors[:4]) <= value and max(errors[4:]) <= gradient, (name, errors)


def test_compiles_for_an_h100():
    """Without one: the interpreter takes what the compiler would refuse. fp64 is slow there, and has no place in a row."""
    types = {"student": "*bf16", "teacher": "*bf16", "place": "*i64", "inverse_t": "fp32"}
    types |= dict.fromkeys(("out", "largest", "scale", "hit"), "*fp32")
    for kernel, block in ((kernels._read, kernels.READ_BLOCK), (kernels._write, kernels.WRITE_BLOCK)):
        names, constants = kernel.arg_names, {"HAS_TEACHER": True, "WARM": True, "BLOCK": block}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert "f64" not in compiled.asm["ptx"]
