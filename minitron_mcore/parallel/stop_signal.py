"""The stop flag of a process: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (SLURM's warning before the time limit) ask a stage to stop.

A context manager decides what a signal does inside its block, and the handlers from before come back after it:

    at_once           `Stopped` is raised in the main thread: for setup, and for stages that publish nothing before their end
    at_stop_points    a flag is set, and all ranks raise `Stopped` together at the next `stop_point`: for long stages
    wait_for          the signal goes to a child process, whose status tells the rest: for the pipeline
    ignored           for ranks that other ranks tell to end

A second signal ends the process at once if one of both is SIGINT. Imports no torch, except to ask other ranks.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from subprocess import Popen
from types import FrameType
from typing import Any

from minitron_mcore.errors import STOPPED_STATUS, Stopped

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_received: list[int] = []
"""Signals that this process received since it entered the outermost block."""
_depth = 0
_stopping = False
"""Whether all ranks have agreed to stop. torchrun signals the others when the first has ended, which must not interrupt them."""
_resumes: bool | None = None
"""Inside `at_stop_points`: whether the same command continues the stage; None outside."""


@contextmanager
def _handled_by(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` for each signal inside the block. Only the main thread receives signals; in others nothing changes."""
    global _depth, _stopping
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def receive(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        if len(_received) > 1 and signal.SIGINT in _received[-2:]:
            raise KeyboardInterrupt
        handle(number)

    if _depth == 0:
        _received.clear()
        _stopping = False
    _depth += 1
    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        _depth -= 1
        for number, earlier in before.items():
            signal.signal(number, earlier)


def at_once() -> AbstractContextManager[None]:
    """A block in which a signal raises `Stopped`, on this rank only."""

    def stop(number: int) -> None:
        if not _stopping:
            raise Stopped(
                f"stopped by {signal.Signals(number).name}: the same command continues from what is complete."
            )

    return _handled_by(stop)


@contextmanager
def at_stop_points(resumes: bool = True) -> Iterator[None]:
    """A block in which a signal waits for the next `stop_point`.

    Args:
        resumes: whether the same command continues this stage or starts it again, for the message; the outermost block decides.
    """
    global _resumes
    outer = _resumes
    _resumes = resumes if outer is None else outer
    try:
        with _handled_by(lambda number: None):
            yield
    finally:
        _resumes = outer


def requested_on_any_rank() -> bool:
    """Whether a rank of this world received a signal, on which all ranks then stop (collective)."""
    global _stopping
    import torch
    import torch.distributed as dist

    from minitron_mcore.parallel import process_groups

    _stopping = bool(_received)
    if dist.is_initialized():
        requested = torch.tensor(float(_stopping), device=process_groups.device())
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        _stopping = bool(requested.item())
    return _stopping


def stopped(done: str) -> Stopped:
    """The exception that all ranks raise inside `at_stop_points`; `done` says how far the stage is, as in "after step 3 of 9"."""
    how = "starts it again" if _resumes is False else "continues"
    return Stopped(f"stopped by a signal {done}: the same command {how}.", on_all_ranks=True)


def stop_point(done: str) -> None:
    """Raise `stopped(done)` on all ranks if one of them received a signal (collective)."""
    if requested_on_any_rank():
        raise stopped(done)


@contextmanager
def ignored() -> Iterator[None]:
    """A block in which signals do nothing, except that a second Ctrl-C ends the process."""
    with _handled_by(lambda number: None):
        yield


def wait_for(process: Popen[Any]) -> int:
    """Exit status of a child process, to which signals are passed on; STOPPED_STATUS if it succeeded in spite of one."""
    try:
        with _handled_by(process.send_signal):
            status = process.wait()
            return STOPPED_STATUS if _received and not status else status
    except KeyboardInterrupt:  # the second signal
        process.send_signal(signal.SIGINT)
        raise
