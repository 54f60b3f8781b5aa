"""A SLURM of one machine, for batch scripts under test: `bin` has sbatch, srun, scontrol and scancel, which call this file.

Nodes are loopback addresses, 127.0.0.2 and up. $SIMULATED_SLURM is a folder; each job has a folder in it:

    pid           process of the batch script
    tasks         processes of the running step
    requeue       made by `scontrol requeue`
    near_limit    made by a test: the clock moves to the warning before the time limit
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["SIMULATED_SLURM"])
FIRST_JOB, FIRST_NODE = 100, 2


def main(command: str, *arguments: str) -> int:
    return {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "scancel": scancel}[command](list(arguments))


def options_of(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Leading `--name=value` and `--name value` as a dictionary, and what follows them."""
    options: dict[str, str] = {}
    while arguments and arguments[0].startswith("--"):
        name, equals, value = arguments.pop(0)[2:].partition("=")
        if not equals and name not in ("wait", "exclusive", "requeue"):
            value = arguments.pop(0)
        options[name] = value
    return options, arguments


def seconds(limit: str) -> int:
    """hours:minutes:seconds."""
    hours, minutes, rest = map(int, limit.split(":"))
    return 3600 * hours + 60 * minutes + rest


def sbatch(arguments: list[str]) -> int:
    """Run a batch script to its end, as with --wait, and again each time it is requeued; its status."""
    given, (script, *rest) = options_of(arguments)
    own = re.findall(r"^#SBATCH (.*)$", Path(script).read_text(), re.MULTILINE)
    options = options_of(own)[0] | given
    job = FIRST_JOB + len(list(ROOT.iterdir()))
    folder = ROOT / str(job)
    folder.mkdir()
    nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
    env = os.environ | {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": f"127.0.0.[{FIRST_NODE}-{FIRST_NODE + nodes - 1}]",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_TASKS_PER_NODE": f"{tasks}(x{nodes})",
        **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "ENVIRONMENT": "BATCH"},
    }
    restarts = 0
    while True:
        with open(options["output"], "a") as output:
            batch = subprocess.Popen(
                ["bash", script, *rest],
                env=env | {"SLURM_RESTART_COUNT": str(restarts)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        (folder / "pid").write_text(str(batch.pid))
        status = wait_for_batch(batch, folder, seconds(options["time"]), options["signal"])
        if not (folder / "requeue").exists():
            return status
        (folder / "requeue").unlink()
        restarts += 1


def wait_for_batch(batch: subprocess.Popen, folder: Path, limit: int, warning: str) -> int:
    """Wait for the script, warn it (`B:USR1@300`) before its time limit, and kill it and its tasks at the limit."""
    name, before = re.fullmatch(r"B:(\w+)@(\d+)", warning).groups()
    end, is_warned = time.monotonic() + limit, False
    while batch.poll() is None:
        time.sleep(0.05)
        if (folder / "near_limit").exists():
            (folder / "near_limit").unlink()
            end = time.monotonic() + int(before)
        if not is_warned and time.monotonic() >= end - int(before):
            batch.send_signal(signal.Signals[f"SIG{name}"])
            is_warned = True
        if time.monotonic() > end:
            signal_tasks(folder, signal.SIGKILL)
            batch.kill()
    return batch.wait()


def srun(arguments: list[str]) -> int:
    """Start one process a task; the highest status. Tasks that remain --wait seconds after the first end are killed."""
    options, command = options_of(arguments)
    per_node, nodes = map(int, re.findall(r"\d+", os.environ["SLURM_TASKS_PER_NODE"]))
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
        "SLURM_STEP_NUM_TASKS": os.environ["SLURM_NTASKS"],
        "SLURM_STEP_TASKS_PER_NODE": os.environ["SLURM_TASKS_PER_NODE"],
    }
    tasks = []
    for node in range(nodes):
        for local in range(per_node):
            own = {"SLURM_PROCID": len(tasks), "SLURM_LOCALID": local, "SLURM_NODEID": node}
            own |= {"SLURMD_NODENAME": f"127.0.0.{FIRST_NODE + node}"}
            env = os.environ | step | {name: str(value) for name, value in own.items()}
            tasks.append(subprocess.Popen(command, env=env))
    folder = ROOT / os.environ["SLURM_JOB_ID"]
    (folder / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    end = float("inf")
    while any(task.poll() is None for task in tasks):
        time.sleep(0.05)
        if any(task.poll() is not None for task in tasks):
            end = min(end, time.monotonic() + int(options["wait"]))
        if time.monotonic() > end:
            signal_tasks(folder, signal.SIGKILL)
    (folder / "tasks").unlink()
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scontrol(arguments: list[str]) -> int:
    match arguments:
        case ["show", "hostnames", nodes]:
            prefix, first, last = re.fullmatch(r"(.*)\[(\d+)-(\d+)\]", nodes).groups()
            print("\n".join(f"{prefix}{n}" for n in range(int(first), int(last) + 1)))
        case ["requeue", job]:
            (ROOT / job / "requeue").touch()
            os.kill(int((ROOT / job / "pid").read_text()), signal.SIGTERM)
    return 0


def scancel(arguments: list[str]) -> int:
    options, (job,) = options_of(arguments)
    signal_tasks(ROOT / job, signal.Signals[f"SIG{options['signal']}"])
    return 0


def signal_tasks(folder: Path, number: signal.Signals) -> None:
    for pid in map(int, (folder / "tasks").read_text().split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
