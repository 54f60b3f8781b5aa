"""A rank that hangs takes all others with it, for they wait in a collective: this finds out who waits for whom, and ends the job.

Each rank's thread looks at how long ago the main thread last said `beat` (every micro-batch does). When one has stood still for
too long it raises the alarm through the store that the ranks met at; every thread answers with the place where its main thread is.
Who doesn't answer is stopped or gone, and who answers from elsewhere than a wait for others is what they wait for.
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

import torch.distributed as dist

from minitron_mcore.errors import HUNG_STATUS
from minitron_mcore.parallel import cpu_backend

_WAITS = (".wait(", "synchronize(")
_WAITS_CUDA = (".item(", ".tolist(", ".cpu(")  # where a kernel of NCCL's is waited for
_last = time.monotonic()
_timeout = 0.0


def beat() -> None:
    """Say that this rank moves."""
    global _last
    _last = time.monotonic()


@contextmanager
def extended_timeout(minutes: float) -> Iterator[None]:
    """Let a rank stand still for so long inside the block, which all ranks enter and leave together, if that is longer."""
    global _timeout
    beat()
    _timeout = 60 * minutes
    try:
        yield
    finally:
        beat()
        _timeout = 0.0


class HangWatchdog:
    """Watches from entering to leaving the context; the job ends with status HUNG_STATUS when a rank stood still too long.

    Args:
        minutes: a rank may stand still. The groups' own timeout must be longer (see `process_groups.distributed_context`).
        where: () -> what the run is doing, for the message.
        told: called on the one rank that speaks, with the message and the ranks that it blames.
    """

    def __init__(self, minutes: float, where: Callable[[], str], told: Callable[[str, list[int]], None]):
        self.seconds, self.where, self.told = 60 * minutes, where, told
        self.every = min(5.0, self.seconds / 4)
        self.over = threading.Event()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def __enter__(self) -> "HangWatchdog":
        beat()
        # A clone, since the main thread may be waiting in the store itself.
        self.store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store().clone())
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.over.wait(self.every):
            still = time.monotonic() - _last
            if late := still > max(self.seconds, _timeout):
                self.store.set("alarm", "")
            if late or self.store.check(["alarm"]):
                self._end(still)

    def _end(self, still: float) -> None:
        place, waits = _main_thread()
        self.store.set(f"{self.rank}", json.dumps({"place": place, "waits": waits, "still": still}))
        time.sleep(3 * self.every)  # every thread looks within `every`
        names = {rank: f"{rank}" for rank in range(self.size)}
        found = {r: json.loads(self.store.get(name)) for r, name in names.items() if self.store.check([name])}
        if self.rank == min(found):
            message, blamed = _verdict(found, self.size, self.where())
            print(f"error: {message}", flush=True)
            self.told(message, blamed)
            self.store.set("told", "")
        else:
            self.store.wait(["told"], timedelta(seconds=10))
        os._exit(HUNG_STATUS)  # the main thread may never come back


def _main_thread() -> tuple[str, bool]:
    """Where the main thread is, and whether it waits for other ranks there."""
    frame = sys._current_frames()[threading.main_thread().ident]
    file, line = frame.f_code.co_filename, linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    marks = _WAITS + (() if cpu_backend.is_cpu() else _WAITS_CUDA)
    waits = "torch/distributed/" in file or any(mark in line for mark in marks)
    return f"{frame.f_code.co_name} ({'/'.join(Path(file).parts[-2:])}:{frame.f_lineno})", waits


def _verdict(found: dict[int, dict], size: int, where: str) -> tuple[str, list[int]]:
    """One sentence, and the ranks that it blames."""
    silent = [rank for rank in range(size) if rank not in found]
    busy = [rank for rank, answer in found.items() if not answer["waits"]]
    longest = max(answer["still"] for answer in found.values())
    reasons = [f"rank {rank} does not answer (its process is stopped or gone)" for rank in silent]
    reasons += [f"rank {rank} is in {found[rank]['place']} while others wait" for rank in busy]
    if not reasons:
        reasons = [f"rank {rank} waits in {answer['place']}" for rank, answer in found.items()]
    shown = "; ".join(reasons[:8]) + (f"; and {len(reasons) - 8} more" if len(reasons) > 8 else "")
    message = (
        f"nothing has moved for {longest:.0f} s in {where}: {shown}. The same command goes on from the last saved step."
    )
    return message, silent + busy
