"""Run a function on several real processes over gloo, as tests and benchmarks do.

    pool = Pool(4)
    results = pool.run(fn, 3, ParallelConfig(tensor=3), arg, ...)   # fn(arg, ...) on 3 ranks; one result a rank

The workers live as long as the pool and import torch and megatron-core once; every call gets fresh process groups.
"""

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from minitron_mcore.config import ParallelConfig


def _work(rank: int, inbox, outbox) -> None:
    torch.set_num_threads(1)
    from minitron_mcore import runtime

    while (task := inbox.get()) is not None:
        fn, world_size, parallel, path, args = task
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        try:
            store = dist.FileStore(path, world_size)
            with runtime.distributed(parallel, store=store):
                outbox.put((rank, fn(*args), None))
        except BaseException as error:  # a truncated shard raises a BaseException in torch.distributed.checkpoint
            outbox.put((rank, None, (type(error).__name__, str(error), traceback.format_exc())))


class WorkerError(Exception):
    """A rank failed; `kind` and `reason` are its exception's name and text, the message holds its traceback."""

    def __init__(self, rank: int, kind: str, reason: str, trace: str):
        super().__init__(f"rank {rank}: {trace}")
        self.kind, self.reason = kind, reason


class Pool:
    """`size` worker processes on gloo, started at once and kept until `close`."""

    def __init__(self, size: int):
        context = mp.get_context("spawn")
        self.outbox = context.Queue()
        self.inboxes = [context.Queue() for _ in range(size)]
        self.workers = [
            context.Process(target=_work, args=(r, q, self.outbox), daemon=False) for r, q in enumerate(self.inboxes)
        ]
        for worker in self.workers:
            worker.start()

    def run(self, fn: Callable, world_size: int, parallel: ParallelConfig, *args: Any, timeout: float = 300) -> list:
        """`fn(*args)` on ranks 0..world_size-1 within the layout `parallel`; its results (numbers, tensors on CPU) in rank order.

        Raises:
            WorkerError: the first rank that failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            for inbox in self.inboxes[:world_size]:
                inbox.put((fn, world_size, parallel, os.path.join(folder, "store"), args))
            results, failed = [None] * world_size, []
            for _ in range(world_size):
                rank, result, error = self.outbox.get(timeout=timeout)
                results[rank] = result
                failed += [(rank, *error)] if error else []
        if failed:
            raise WorkerError(*min(failed))
        return results

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)
        for worker in self.workers:
            worker.join(timeout=10)
            if worker.is_alive():
                worker.kill()
