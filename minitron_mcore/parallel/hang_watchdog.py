"""Detects that all ranks have stopped making progress, finds out which ranks the others wait for, and ends the job.

Each rank has a watchdog thread, and its main thread calls `beat` whenever it makes progress. The time that may pass between two
beats depends on the `phase`. If it is over on one rank, that rank's thread raises an alarm in the rendezvous store, and every
thread writes where its main thread is and how much of its own time is left. As long as one rank has time left, the others wait for
it and the run continues. Otherwise the job ends. A rank that writes nothing is stopped or dead; a rank that is not inside a wait
for other ranks is the one they wait for. After SIGTERM a rank is not waited for that long (`stops_in_waits`), and a rank that stops
alone stops the others.
"""

import itertools
import json
import linecache
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from minitron_mcore.config.performance import HangConfig
from minitron_mcore.errors import HUNG_STATUS, STOPPED_STATUS, Stopped
from minitron_mcore.parallel.megatron_patches import cpu_backend

STOP_SECONDS = 10.0
"""From SIGTERM or Ctrl-C to the end of a rank that waits for other ranks all the while. torchrun kills its ranks after 30 s."""
_WAITS = (".wait(", "synchronize(")
_WAITS_CUDA = (".item(", ".tolist(", ".cpu(")  # these wait for NCCL's kernels


class Phase(StrEnum):
    """What a rank is doing, which decides how long it may take between two beats."""

    setup = "setup"
    """Everything before, between and after steps: text, models, optimizer."""
    step = "step"
    """A micro-batch of training or of a forward pass."""
    save = "save"
    """Writing a checkpoint."""
    idle = "idle"
    """Waiting for other processes' requests, for any time."""


_phase: tuple[Phase, Callable[[], str]] = Phase.setup, lambda: "setup"
_last_beat = time.monotonic()
_on_hang: Callable[[str, list[int]], None] | None = None


def beat() -> None:
    """Record that this rank makes progress."""
    global _last_beat
    _last_beat = time.monotonic()


@contextmanager
def phase(name: Phase, where: Callable[[], str]) -> Iterator[None]:
    """The limit of phase `name` applies inside the block; `where` describes the work for the message."""
    global _phase
    outer = _phase
    beat()
    _phase = name, where
    try:
        yield
    finally:
        beat()
        _phase = outer


@contextmanager
def reported_to(on_hang: Callable[[str, list[int]], None]) -> Iterator[None]:
    """Inside the block a hang calls `on_hang`, on one rank, with the message and the ranks that the others wait for."""
    global _on_hang
    outer, _on_hang = _on_hang, on_hang
    try:
        yield
    finally:
        _on_hang = outer


class HangWatchdog:
    """Context manager that ends the process with HUNG_STATUS, on all ranks, if no rank makes progress within its limit.

    Args:
        limits: of each phase. The process groups' own timeout must be longer (`distributed_context` sees to that).
        store: the `dist.Store` of all processes. A clone is used, since the main thread may be waiting in the store itself.
        rank: of this process.
        size: number of processes.
    """

    def __init__(self, limits: HangConfig, store: Any, rank: int, size: int):
        minutes = {Phase.setup: limits.setup_minutes, Phase.step: limits.step_minutes, Phase.save: limits.save_minutes}
        self.seconds = {name: 60 * value for name, value in minutes.items()}
        self.interval = min(5.0, min(self.seconds.values()) / 4)
        self.store, self.rank, self.size = dist.PrefixStore("watch", store.clone()), rank, size
        self.ended = threading.Event()

    def __enter__(self) -> "HangWatchdog":
        beat()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.ended.set()
        self.thread.join()
        if isinstance(error, Stopped) and not error.on_all_ranks:
            self._stop_others()

    def _stop_others(self) -> None:
        """Have the other ranks' threads send SIGTERM to their processes, which would fail when this one ends, and wait for it."""
        end = time.monotonic() + self.interval + 1
        with suppress(dist.DistError):
            self.store.set("stopped", "")
            told = self.store.add("told", 1)
            while told < self.size and time.monotonic() < end:
                time.sleep(0.05)
                told = self.store.add("told", 0)

    def _run(self) -> None:
        alarm, quiet_until, stops = 0, 0.0, False
        while not self.ended.wait(self.interval):
            with suppress(dist.DistError):  # the process that held the store has ended
                if not stops and self.store.check(["stopped"]):
                    stops = True
                    os.kill(os.getpid(), signal.SIGTERM)
                    self.store.add("told", 1)
                if self._seconds_left() < 0 and time.monotonic() > quiet_until:
                    self.store.set(f"alarm {alarm}", "")
                if self.store.check([f"alarm {alarm}"]):
                    alarm += 1
                    quiet_until = time.monotonic() + self._compare(alarm - 1)

    def _seconds_left(self) -> float:
        """Time until the next beat must come; 0 in the idle phase, which neither raises an alarm nor keeps others waiting."""
        idle = time.monotonic() - _last_beat
        return self.seconds[_phase[0]] - idle if _phase[0] in self.seconds else 0.0

    def _compare(self, alarm: int) -> float:
        """Report this rank, and end the job unless another rank has time left; returns that time."""
        frame = _main_frame()
        report = {"place": _place(frame), "waits": _waits(frame), "where": _phase[1](), "left": self._seconds_left()}
        report["idle"] = time.monotonic() - _last_beat if _phase[0] in self.seconds else 0.0
        self.store.set(f"{alarm} {self.rank}", json.dumps(report))
        self.ended.wait(3 * self.interval)  # every thread checks for the alarm once an interval
        if self.store.add(f"{alarm} decided", 1) == 1:  # one rank decides: others may see more reports than it does
            keys = {rank: f"{alarm} {rank}" for rank in range(self.size)}
            reports = {r: json.loads(self.store.get(key)) for r, key in keys.items() if self.store.check([key])}
            left = max(report["left"] for report in reports.values())
            if left <= 0:
                message, ranks = _diagnosis(reports, self.size)
                print(f"error: {message}", flush=True)
                if _on_hang:
                    _on_hang(message, ranks)
            self.store.set(f"{alarm} left", str(left))
        self.store.wait([f"{alarm} left"], timedelta(seconds=10))
        left = float(self.store.get(f"{alarm} left"))
        if left <= 0:
            os._exit(HUNG_STATUS)  # the main thread may never return
        return left


@contextmanager
def stops_in_waits() -> Iterator[None]:
    """Inside the block SIGTERM and SIGINT end this process after STOP_SECONDS of one wait for other ranks in its main thread.

    Python calls a signal's handler in the main thread, which a wait for a rank that has ended may never give back. Saves may take
    any time, and so may the idle phase. Nothing is saved; the status is STOPPED_STATUS.
    """
    wakeup, wakes = os.pipe()
    os.set_blocking(wakes, False)
    outer, ended = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False), threading.Event()
    threading.Thread(target=_end_in_wait, args=(wakeup, ended), name="stop", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(outer)
        os.close(wakes)


os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # else its signals would be this process's


def _end_in_wait(wakeup: int, ended: threading.Event) -> None:
    while (received := os.read(wakeup, 1)) and received[0] not in (signal.SIGTERM, signal.SIGINT):
        pass
    wait, since = None, 0.0
    while not ended.wait(0.5):
        frame = _main_frame()
        now = (frame, frame.f_lasti) if _waits(frame) and _phase[0] in (Phase.setup, Phase.step) else None
        if now is None or now != wait:
            wait, since = now, time.monotonic()
        elif time.monotonic() - since > STOP_SECONDS:
            stack = " < ".join(_place(each) for each, _ in itertools.islice(traceback.walk_stack(frame), 5))
            print(
                f"rank {os.environ.get('RANK', 0)} stops: after a signal it waited for other ranks for {STOP_SECONDS:.0f} s in "
                f"{_phase[1]()}: {stack}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(STOPPED_STATUS)
    os.close(wakeup)  # not before: a further signal would find a broken pipe


def _main_frame() -> FrameType:
    return sys._current_frames()[threading.main_thread().ident or 0]


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno})"


def _waits(frame: FrameType) -> bool:
    """Whether a thread there waits for other ranks."""
    file = frame.f_code.co_filename
    marks = _WAITS + (() if cpu_backend.is_cpu() else _WAITS_CUDA)
    return "torch/distributed/" in file or any(mark in linecache.getline(file, frame.f_lineno) for mark in marks)


def _diagnosis(reports: dict[int, dict[str, Any]], size: int) -> tuple[str, list[int]]:
    """The message, and the ranks that the others wait for."""
    silent = [rank for rank in range(size) if rank not in reports]
    busy = [rank for rank, report in reports.items() if not report["waits"]]
    longest = max(reports.values(), key=lambda report: report["idle"])
    reasons = [f"rank {rank} does not answer (its process is stopped or dead)" for rank in silent]
    reasons += [f"rank {rank} is in {reports[rank]['place']} while others wait" for rank in busy]
    if not reasons:
        reasons = [f"rank {rank} waits in {report['place']}" for rank, report in reports.items()]
    shown = "; ".join(reasons[:8]) + (f"; and {len(reasons) - 8} more" if len(reasons) > 8 else "")
    remedy = "Run the same command again to continue from what is saved."
    return f"no progress for {longest['idle']:.0f} s in {longest['where']}: {shown}. {remedy}", silent + busy
