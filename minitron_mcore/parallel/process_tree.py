"""Processes that end when their parent does, so that no rank is left behind. Imports no torch."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from minitron_mcore.errors import STOPPED_STATUS
from minitron_mcore.parallel import stop_signal

GRACE_SECONDS = 20.0
"""Time to save after the parent has ended. torchrun gives its ranks 30 s."""
_POLL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def end_with_parent(grace: float = GRACE_SECONDS) -> None:
    """Watch the parent in a thread. When it has ended, this process gets SIGTERM, and ends after `grace` seconds at the latest."""
    threading.Thread(target=_watch, args=(os.getppid(), grace), name="parent", daemon=True).start()


def _watch(parent: int, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    print(f"process {os.getpid()} stops: its parent {parent} has ended", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os._exit(STOPPED_STATUS)  # the main thread may never return


def run_child(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command and wait for it; its exit status, or STOPPED_STATUS if a signal came and the command succeeded.

    Signals to this process are passed on. On Linux the kernel sends SIGTERM to the command when this process ends. The command has
    a process group of its own, so that a terminal's Ctrl-C reaches it once.
    """
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def bind_to_parent() -> None:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # which ended before the call
            os._exit(STOPPED_STATUS)

    with subprocess.Popen(command, env=env, preexec_fn=bind_to_parent, process_group=0) as process:
        return stop_signal.wait_for(process)
