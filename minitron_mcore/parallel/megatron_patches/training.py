"""Hooks into megatron-core's optimizer and DistributedDataParallel."""

from collections.abc import Callable
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch import nn


def check_gradient_norm(optimizer: ChainedOptimizer, check: Callable[[float], None]) -> None:
    """Call `check` with the gradient's norm over all ranks before each step changes anything; it may raise.

    megatron-core computes the norm first, but makes the step even if the norm is NaN or infinite.
    """
    norm_of = optimizer.get_grad_norm

    def checked() -> float:
        norm = float(norm_of())
        check(norm)
        return norm

    optimizer.get_grad_norm = checked


def wait_for_head(ddp: DistributedDataParallel, before: nn.Module, head: nn.Parameter) -> None:
    """Under `overlap_param_gather`, complete the gather of the head's weights before the module `before` runs.

    megatron-core waits for a module's weights before it calls the module. The head is never called: the loss uses its weights.
    """
    skip = ddp.ddp_config.align_param_gather

    def wait(*unused: Any) -> None:
        ddp.param_to_bucket_group[head].finish_param_sync(skip)

    before.register_forward_pre_hook(wait)
