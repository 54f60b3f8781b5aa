"""Run a function on several real processes over gloo, as tests and benchmarks do.

    pool = Pool(4)
    results = pool.run(fn, 3, ParallelConfig(tensor=3), arg, ...)   # fn(arg, ...) on 3 ranks; one result a rank

The workers live as long as the pool and import torch and megatron-core once; every call gets fresh process groups.
"""

import gc
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from minitron_mcore.config import ParallelConfig


def _work(rank: int, inbox, outbox) -> None:
    torch.set_num_threads(1)
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from minitron_mcore import runtime

    while (task := _next(inbox)) is not None:
        fn, world_size, parallel, path, args = task
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        try:
            store = dist.FileStore(path, world_size)
            with runtime.distributed(parallel, store=store):
                outbox.put((rank, fn(*args), None))
        except BaseException as error:  # a truncated shard raises a BaseException in torch.distributed.checkpoint
            outbox.put((rank, None, (type(error).__name__, str(error), traceback.format_exc())))
            del error
        # A group's gloo threads end with its last reference, and megatron-core's rotary cache holds whole models.
        RotaryEmbedding.forward.cache_clear()
        gc.collect()


def _next(inbox):
    """The next task; None when there are no more, or nobody is left to ask for any."""
    while mp.parent_process().is_alive():
        try:
            return inbox.get(timeout=2)
        except queue.Empty:
            continue
    return None


class WorkerError(Exception):
    """A rank failed; `kind` and `reason` are its exception's name and text, the message holds its traceback."""

    def __init__(self, rank: int, kind: str, reason: str, trace: str):
        super().__init__(f"rank {rank}: {trace}")
        self.kind, self.reason = kind, reason


class Pool:
    """`size` worker processes on gloo, started at once and kept until `close`; replaced when one dies."""

    def __init__(self, size: int):
        self.size = size
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self.outbox = context.Queue()
        self.inboxes = [context.Queue() for _ in range(self.size)]
        self.workers = [context.Process(target=_work, args=(r, q, self.outbox)) for r, q in enumerate(self.inboxes)]
        for worker in self.workers:
            worker.start()

    def run(self, fn: Callable, world_size: int, parallel: ParallelConfig, *args: Any, timeout: float = 900) -> list:
        """`fn(*args)` on ranks 0..world_size-1 within the layout `parallel`; its results (numbers, CPU tensors) in rank order.

        Raises:
            WorkerError: the first rank that failed, died or did not answer in `timeout` seconds.
        """
        results, failed = [None] * world_size, []
        with tempfile.TemporaryDirectory() as folder:
            for inbox in self.inboxes[:world_size]:
                inbox.put((fn, world_size, parallel, os.path.join(folder, "store"), args))
            waiting, deadline, failed_at = set(range(world_size)), time.monotonic() + timeout, 0.0
            while waiting:
                try:
                    rank, result, error = self.outbox.get(timeout=1)
                except queue.Empty:
                    dead = [r for r in waiting if not self.workers[r].is_alive()]
                    late = time.monotonic() > deadline
                    # Others may wait for ever on one that failed or died.
                    if dead or late or (failed and time.monotonic() > failed_at + 20):
                        self.close(wait=False)
                        self._start()
                        rank = dead[0] if dead else min(waiting)
                        failed.append((rank, "Lost", "died" if dead else "did not answer", "no answer"))
                        break
                    continue
                results[rank] = result
                waiting.discard(rank)
                if error:
                    failed.append((rank, *error))
                    failed_at = time.monotonic()
        if failed:
            raise WorkerError(*failed[0])
        return results

    def close(self, wait: bool = True) -> None:
        for inbox in self.inboxes:
            inbox.put(None)
        for worker in self.workers:
            worker.join(timeout=10 if wait else 0)
            worker.kill()
