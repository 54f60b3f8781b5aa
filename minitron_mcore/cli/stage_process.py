"""One stage in processes of its own, for pipelines and sweeps. Imports no torch."""

import os
import shlex
import sys
from collections.abc import Sequence

from minitron_mcore.cli.compose import LAUNCH
from minitron_mcore.parallel import process_tree


def run(stage: str, overrides: Sequence[str], processes: int = 1) -> int:
    """Run launch/`stage`.py in `processes` processes of this machine; its exit status (see `process_tree.run_child`)."""
    torchrun = ["-m", "minitron_mcore.cli.torchrun", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(LAUNCH / f"{stage}.py"), *overrides]
    threads = max(1, (os.cpu_count() or 1) // processes)
    return process_tree.run_child(command, {"OMP_NUM_THREADS": str(threads)} | os.environ)


def shown(stage: str, overrides: Sequence[str], processes: int = 1) -> str:
    """The same as a command for a shell."""
    return shlex.join(["minitron", stage, *(["--nproc", str(processes)] if processes > 1 else []), *overrides])
