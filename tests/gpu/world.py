"""Runs a function in a world of one rank: in this process on its CUDA device, or in another process without one.

NCCL takes one rank a device, and a process that has used CUDA cannot be forked, so the tests of this folder start no ranks. All
tests of a process share one world: with eight processes on an H100 it took ten seconds to make one.
"""

import contextlib
import functools
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

ROOT = Path(__file__).parents[2]


def here(fn: Callable, *args: Any) -> Any:
    """`fn(*args)` in a world of one rank on this process's device; tensors in the result are moved to the CPU."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    _world()
    model_parallel_cuda_manual_seed(1234, force_reset_rng=True)  # as process_groups.distributed_context begins
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), fn(*args))


@contextlib.contextmanager
def shared(*args: Any, **kwargs: Any):
    """In place of `process_groups.distributed_context`, for launch files of one rank: the world that is there."""
    _world()
    yield


def leave() -> None:
    """End the world, if there is one."""
    if _world.cache_info().currsize:
        _world().close()
        _world.cache_clear()


@functools.cache
def _world() -> contextlib.ExitStack:
    from minitron_mcore.config.settings import ParallelConfig
    from minitron_mcore.parallel import process_groups

    _prepare()
    stack = contextlib.ExitStack()
    stack.enter_context(process_groups.distributed_context(ParallelConfig()))
    return stack


def _prepare() -> None:
    # megatron-core's schedules collect garbage at every call, and half a test would be spent on what imports have made.
    gc.collect()
    gc.freeze()


def on_cpu(folder: Path, *jobs: tuple) -> list:
    """Results of jobs (function, *arguments) on the CPU: in this process where it has no CUDA device, else in one that sees none
    (see `alone`)."""
    return [fn(*args) for fn, *args in jobs] if not torch.cuda.is_available() else alone(folder, *jobs)


def alone(folder: Path, *jobs: tuple) -> list:
    """Results of jobs (function, *arguments) in one process that sees no CUDA device, Transformer Engine or Apex."""
    folder.mkdir()
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.gpu.world", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "results", weights_only=False)


def _main(folder: Path) -> None:
    sys.modules.update(dict.fromkeys(("transformer_engine", "apex"), None))  # their optimizers need CUDA
    jobs = pickle.loads((folder / "jobs").read_bytes())
    with torch.compiler.set_stance("force_eager"):
        torch.save([fn(*args) for fn, *args in jobs], folder / "results")
    leave()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
