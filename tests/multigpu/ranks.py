"""Starts the CPU tests' functions on ranks over NCCL, or over gloo where there is no CUDA device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.testing import on_ranks


def need(devices: int) -> None:
    """Skip the test where there are fewer CUDA devices than that, but at least one."""
    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} CUDA devices; there are {torch.cuda.device_count()}")


def launch(fn: Callable, world: int, parallel: ParallelConfig, *args: Any, **kwargs: Any) -> list:
    """`testing.on_ranks`, with tensors of the results on the CPU; skips the test where there are too few devices."""
    need(world)
    return on_ranks(_on_host, world, parallel, fn, *args, **kwargs)


def _on_host(fn: Callable, *args: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), fn(*args))
