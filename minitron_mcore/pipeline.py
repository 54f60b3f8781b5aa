"""Launch files one after another, each in processes of its own, as a person would start them."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from minitron_mcore.errors import UserError

LAUNCH = Path(__file__).parents[1] / "launch"


def stage(name: str, *overrides: str, processes: int = 1) -> float:
    """Run launch/`name`.py with Hydra overrides under torchrun; prints the command, returns its seconds.

    Raises:
        UserError: the stage failed; its own sentence stands above.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(LAUNCH / f"{name}.py"), *overrides]
    print(f"\n$ torchrun --nproc-per-node {processes} launch/{name}.py {shlex.join(overrides)}", flush=True)
    threads = max(1, (os.cpu_count() or 1) // processes)
    start = time.monotonic()
    failed = subprocess.run(command, env={"OMP_NUM_THREADS": str(threads)} | os.environ).returncode
    if failed:
        raise UserError(f"launch/{name}.py failed with status {failed}; what went wrong stands above.")
    return time.monotonic() - start
