"""Process groups that torch.distributed and megatron-core have no public way to make or swap."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from minitron_mcore.parallel.megatron_patches import cpu_backend


def snapshot() -> dict[str, Any]:
    """megatron-core's global parallel state: the current groups, ranks and sizes, by variable name."""
    return {name: value for name, value in vars(mpu).items() if name.startswith("_") and name.isupper()}


@contextlib.contextmanager
def swapped(state: dict[str, Any]) -> Iterator[None]:
    """Use another `snapshot` inside the block.

    `initialize_model_parallel` refuses a second layout, and megatron-core's schedules, experts and checkpoint readers take
    groups from these globals, not from arguments.
    """
    before = snapshot()
    try:
        vars(mpu).update(state)
        yield
    finally:
        vars(mpu).update(before)


UNINITIALIZED = snapshot()
"""The state of a process that has no groups yet."""


def default_store() -> Any:
    """The store of the default process group (`dist.Store`), which torch gives no public access to."""
    return dist.distributed_c10d._get_default_store()


def joint_group(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A process group over ranks of several torch.distributed worlds (collective); `dist.new_group` takes ranks of one only.

    The result has the backend's methods (`broadcast`, `alltoall_base`), which take lists and option objects.
    """
    store = dist.PrefixStore("group", store)
    if cpu_backend.is_cpu():
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)
