"""Detects a rank that hangs, finds out which rank the others wait for, and ends the job.

Each rank has a watchdog thread, and each micro-batch calls `beat`. If a rank's last beat is too old, its thread raises an alarm in
the rendezvous store. Then every thread writes where its main thread is. A rank that writes nothing is stopped or dead; a rank
that is not inside a wait for other ranks is the one they wait for.
"""

import json
import linecache
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from minitron_mcore.errors import HUNG_STATUS
from minitron_mcore.parallel.megatron_patches import cpu_backend, groups

_WAITS = (".wait(", "synchronize(")
_WAITS_CUDA = (".item(", ".tolist(", ".cpu(")  # these wait for NCCL's kernels
_last_beat = time.monotonic()
_extended_seconds = 0.0


def beat() -> None:
    """Record that this rank makes progress."""
    global _last_beat
    _last_beat = time.monotonic()


@contextmanager
def extended_timeout(minutes: float) -> Iterator[None]:
    """Raise the timeout to at least `minutes` inside the block, which all ranks enter and leave together."""
    global _extended_seconds
    beat()
    _extended_seconds = 60 * minutes
    try:
        yield
    finally:
        beat()
        _extended_seconds = 0.0


class HangWatchdog:
    """Context manager that ends the process with HUNG_STATUS, on all ranks, if a rank makes no progress for too long.

    Args:
        minutes: allowed between two beats. The process groups' own timeout must be longer (`distributed_context` sees to that).
        where: returns what the run is doing, for the message.
        on_hang: called on one rank with the message and the ranks that it blames.
    """

    def __init__(self, minutes: float, where: Callable[[], str], on_hang: Callable[[str, list[int]], None]):
        self.seconds, self.where, self.on_hang = 60 * minutes, where, on_hang
        self.interval = min(5.0, self.seconds / 4)
        self.ended = threading.Event()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def __enter__(self) -> "HangWatchdog":
        beat()
        # A clone, since the main thread may be waiting in the store itself.
        self.store = dist.PrefixStore("watch", groups.default_store().clone())
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.ended.wait(self.interval):
            idle = time.monotonic() - _last_beat
            if late := idle > max(self.seconds, _extended_seconds):
                self.store.set("alarm", "")
            if late or self.store.check(["alarm"]):
                self._end(idle)

    def _end(self, idle: float) -> None:
        place, waits = _main_thread()
        self.store.set(f"{self.rank}", json.dumps({"place": place, "waits": waits, "idle": idle}))
        time.sleep(3 * self.interval)  # every thread checks for the alarm once an interval
        reports = {r: json.loads(self.store.get(f"{r}")) for r in range(self.size) if self.store.check([f"{r}"])}
        if self.rank == min(reports):
            message, blamed = _verdict(reports, self.size, self.where())
            print(f"error: {message}", flush=True)
            self.on_hang(message, blamed)
            self.store.set("reported", "")
        else:
            self.store.wait(["reported"], timedelta(seconds=10))
        os._exit(HUNG_STATUS)  # the main thread may never return


def _main_thread() -> tuple[str, bool]:
    """Where the main thread is, and whether it waits for other ranks there."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    file, line = frame.f_code.co_filename, linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    marks = _WAITS + (() if cpu_backend.is_cpu() else _WAITS_CUDA)
    waits = "torch/distributed/" in file or any(mark in line for mark in marks)
    return f"{frame.f_code.co_name} ({'/'.join(Path(file).parts[-2:])}:{frame.f_lineno})", waits


def _verdict(reports: dict[int, dict[str, Any]], size: int, where: str) -> tuple[str, list[int]]:
    """The message, and the ranks that it blames."""
    silent = [rank for rank in range(size) if rank not in reports]
    busy = [rank for rank, report in reports.items() if not report["waits"]]
    longest = max(report["idle"] for report in reports.values())
    reasons = [f"rank {rank} does not answer (its process is stopped or dead)" for rank in silent]
    reasons += [f"rank {rank} is in {reports[rank]['place']} while others wait" for rank in busy]
    if not reasons:
        reasons = [f"rank {rank} waits in {report['place']}" for rank, report in reports.items()]
    shown = "; ".join(reasons[:8]) + (f"; and {len(reasons) - 8} more" if len(reasons) > 8 else "")
    remedy = "Run the same command again to continue from the last saved step."
    return f"no progress for {longest:.0f} s in {where}: {shown}. {remedy}", silent + busy
