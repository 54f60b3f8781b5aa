"""Runs a function on several processes, for tests and benchmarks: over gloo, or NCCL with CUDA.

    results = on_ranks(fn, 3, ParallelConfig(tensor=3), arg, ...)   # fn(arg, ...) on 3 ranks; one result a rank

Without CUDA each call forks new processes from a server that has imported torch and megatron-core: a fork takes milliseconds, the
imports take seconds, and calls share no groups, threads or caches.
"""

import collections
import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minitron_mcore.checkpoint import run_folder, saving, sharded
from minitron_mcore.config.performance import HangConfig
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.models import build
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups

PRELOADED = ["minitron_mcore.testing", "minitron_mcore.evaluation.perplexity", "minitron_mcore.distill.trainer"]
"""Modules that the server imports once. A rank imports anything else by itself."""


@functools.cache
def _processes() -> multiprocessing.context.BaseContext:
    """How ranks start. With CUDA each is a new process: a fork cannot use CUDA if its parent did, and the imports do."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return server


class RankError(Exception):
    """A rank failed. `kind` and `reason` are its exception's name and text; the message has the traceback."""

    def __init__(self, rank: int, kind: str, reason: str, trace: str):
        super().__init__(f"rank {rank}: {trace}")
        self.rank, self.kind, self.reason = rank, kind, reason


def on_ranks(
    fn: Callable,
    world_size: int,
    parallel: ParallelConfig,
    *args: Any,
    timeout: float = 300,
    teacher_ranks: int = 0,
    teacher_parallel: ParallelConfig | None = None,
    hang: HangConfig | None = None,
) -> list:
    """Call `fn(*args)` on ranks 0..world_size-1 inside `process_groups.distributed_context`.

    Args:
        fn: a module-level function; it returns numbers and CPU tensors.
        world_size: number of processes, teacher ranks included. NCCL allows one per device.
        parallel: the layout of all ranks, or of the student's.
        timeout: seconds.
        teacher_ranks: number of processes of the teacher's world.
        teacher_parallel: its layout; None: `parallel`.
        hang: limits of the hang watchdog.

    Returns:
        Each rank's result, in rank order.

    Raises:
        RankError: the first rank that raised, died, or exceeded the timeout.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _processes().Process(
                target=_work,
                args=(rank, world_size, (parallel, teacher_ranks, teacher_parallel, hang), folder, fn, args),
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        waiting, failed, deadline = dict(enumerate(ranks)), {}, time.monotonic() + timeout
        try:
            while waiting and not failed:
                ended = connection.wait([p.sentinel for p in waiting.values()], max(0, deadline - time.monotonic()))
                if not ended:
                    failed[min(waiting)] = f"no result after {timeout:.0f} s"
                for rank in [r for r, process in waiting.items() if process.sentinel in ended]:
                    if code := waiting.pop(rank).exitcode:
                        failed[rank] = f"died with exit code {code}"
        finally:
            # The remaining ranks may wait for a failed one. Kill their children too.
            for process in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
        # The earliest error is the cause: the ranks after it lose their connections.
        if errors := sorted(Path(folder).glob("*.error"), key=lambda file: file.stat().st_mtime_ns):
            raise RankError(*torch.load(errors[0]))
        for rank, reason in failed.items():
            raise RankError(rank, "Lost", reason, reason)
        return [torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _work(rank: int, world_size: int, settings: tuple, folder: str, fn: Callable, args: tuple) -> None:
    os.setpgrp()
    gc.freeze()  # a collection would copy the server's pages
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    folder, store = Path(folder), dist.FileStore(os.path.join(folder, "store"), world_size)
    parallel, teacher_ranks, teacher_parallel, hang = settings
    world = process_groups.distributed_context(
        parallel, store=store, teacher_ranks=teacher_ranks, teacher_parallel=teacher_parallel, hang=hang
    )
    # The inner one writes fn's error before this rank leaves its groups, which makes the other ranks fail.
    with _error_file(rank, folder), world, _error_file(rank, folder):
        torch.save(fn(*args), folder / f"{rank}.result")


def random_checkpoint(arch: Architecture, folder: Path, dtype: str) -> None:
    """Write a checkpoint of random weights without a tokenizer (one rank; `dtype` is "bf16" or "fp32")."""
    model = build.build(arch, ParallelConfig(), dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    run_folder.describe(folder, arch, "random", {}, folder)
    saving.save_state(folder, 0, sharded.tensors(sharded.model_shards(model, arch)), "random")


class SavedBytes:
    """Bytes that autograd holds for backward passes, each storage counted once: `now`, and the `peak`."""

    def __init__(self):
        self.now = self.peak = 0
        self._holders = collections.Counter()

    def count(self, storage: torch.UntypedStorage, change: int) -> None:
        key = storage.data_ptr()
        before, self._holders[key] = self._holders[key], self._holders[key] + change
        if not (before and self._holders[key]):
            self.now += change * storage.nbytes()
            self.peak = max(self.peak, self.now)


class _SavedTensor:
    def __init__(self, saved: SavedBytes, tensor: torch.Tensor):
        self.saved, self.tensor = saved, tensor
        saved.count(tensor.untyped_storage(), 1)

    def __del__(self):
        self.saved.count(self.tensor.untyped_storage(), -1)


@contextlib.contextmanager
def saved_bytes(parameters: Iterable[torch.Tensor]) -> Iterator[SavedBytes]:
    """Count the bytes that forward passes inside the block save for backward, without `parameters`."""
    saved, own = SavedBytes(), {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor: torch.Tensor):
        return tensor if tensor.untyped_storage().data_ptr() in own else _SavedTensor(saved, tensor)

    def unpack(packed) -> torch.Tensor:
        return packed.tensor if isinstance(packed, _SavedTensor) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield saved


@contextlib.contextmanager
def _error_file(rank: int, folder: Path) -> Iterator[None]:
    file = folder / f"{rank}.error"
    try:
        yield
    except BaseException as error:  # a truncated shard raises a BaseException in torch.distributed.checkpoint
        if not file.is_file():
            torch.save((rank, type(error).__name__, str(error), traceback.format_exc()), file)
        raise SystemExit(1) from None
