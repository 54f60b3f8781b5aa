"""Each patch of torch and megatron-core is still needed. A failure means that the library changed: remove the patch, or fit it anew."""

import dataclasses
import inspect
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from minitron_mcore.config.performance import PerformanceConfig, Recompute
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.models import build, tuning
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import megatron_patches, process_groups, schedule
from minitron_mcore.parallel.megatron_patches import checkpoint, cpu_backend, groups, optimizer_state, training
from minitron_mcore.testing import RankError, on_ranks

from megatron.core import dist_checkpointing, parallel_state  # isort: skip
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads  # isort: skip
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules  # isort: skip
from megatron.core.models.hybrid.hybrid_model import HybridModel  # isort: skip
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # isort: skip
from megatron.core.tensor_parallel import ColumnParallelLinear, model_parallel_cuda_manual_seed  # isort: skip

ONE = ParallelConfig()
ARCH = Architecture("llama", 2, 32, 48, 4, 2, 8, 64, 64, 1e-5, 1e4, None, False)
on_cpu = pytest.mark.skipif(not cpu_backend.is_cpu(), reason="the CPU backend replaces nothing with CUDA")


def trainer(performance: PerformanceConfig):
    """(DDP, optimizer) of a random bf16 model under the distributed optimizer."""
    model = build.build(ARCH, ONE, "bf16", performance)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ddp = DistributedDataParallel(model.config, tuning.ddp_config(performance, True), model)
    options = tuning.optimizer_options(performance)
    config = OptimizerConfig(
        optimizer="adam", lr=0.1, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, **options
    )
    optimizer = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    return ddp, optimizer


def train(performance: PerformanceConfig, factor: float = 1.0):
    """One training step; the loss is a sum of squares times `factor`."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    ddp, optimizer = trainer(performance)
    batch = {"tokens": torch.arange(16).view(2, 8)}

    def loss(hidden, batch):
        return hidden.float().square().sum() * factor, torch.tensor(16, dtype=torch.int32), torch.zeros(1)

    schedule.forward_backward([ddp], [batch], loss, batch, 1)
    optimizer.step()
    return ddp, optimizer


def test_the_version_is_the_one_the_patches_are_for():
    import megatron.core

    assert megatron.core.__version__ == megatron_patches.MEGATRON_CORE


def restore(index: int) -> None:
    for performance in (PerformanceConfig(), PerformanceConfig(recompute=Recompute.full)):
        train(performance)
    (owner, name), original = list(cpu_backend.replaced.items())[index]
    setattr(owner, name, original)
    for performance in (PerformanceConfig(), PerformanceConfig(recompute=Recompute.full)):
        train(performance)


STAND_INS = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in cpu_backend.replaced]


@on_cpu
@pytest.mark.parametrize("index", range(len(STAND_INS)), ids=STAND_INS)
def test_training_needs_the_stand_in(index):
    with pytest.raises(RankError):
        on_ranks(restore, 1, ONE, index)
