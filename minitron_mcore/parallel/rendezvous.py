"""The environment variables in which launchers (torchrun, srun, submitit) tell a process its rank. Imports no torch.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which the rest of this package reads.
`read_launcher` sets them from another launcher's variables: those of srun with one task a rank, which a submitit job on SLURM has
too, and those of submitit's local executor.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping

from minitron_mcore.errors import UserError, refuse

_WORLD = ("RANK", "WORLD_SIZE")
_MASTER = ("MASTER_ADDR", "MASTER_PORT")
_LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
_LAUNCHERS = {"mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}
_REMEDY = "start with torchrun, which sets them all, or unset them"
_FIRST_PORT, _PORTS = 20_000, 10_000
"""Range of the port of rank 0, which a job's number chooses: jobs that share a node rarely choose the same."""


def read_launcher() -> None:
    """Set torchrun's variables from another launcher's, unless they are set.

    Raises:
        UserError: see `problems`; scontrol cannot name the nodes.
    """
    if not {*_WORLD} & {*os.environ}:
        os.environ.update(_submitit_local(os.environ) or _slurm_step(os.environ))
    refuse(problems(os.environ))


def _slurm_step(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of srun; empty where srun started no or one task."""
    # A batch script is one process, but also has SLURM_NTASKS; only srun's processes have the variables of a step.
    in_step = "SLURM_PROCID" in env and env.get("ENVIRONMENT") != "BATCH"
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "") if in_step else "")
    if _number(tasks) in (None, 1):
        return {}
    own = {name: _number(env.get(f"SLURM_{name}", "")) for name in ("PROCID", "LOCALID", "NODEID", "JOB_ID")}
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
    per_node = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", tasks)))
    missing = [f"SLURM_{name}" for name, number in own.items() if number is None]
    if missing := missing + ["SLURM_JOB_NODELIST"] * (not nodes):
        raise UserError(
            f"srun started {tasks} processes, but {', '.join(missing)} {_is(missing)} not set: start with srun or torchrun."
        )
    return {
        "RANK": f"{own['PROCID']}",
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": f"{own['LOCALID']}",
        "LOCAL_WORLD_SIZE": f"{per_node[min(own['NODEID'] or 0, len(per_node) - 1)]}",
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(nodes),
        "MASTER_PORT": env.get("MASTER_PORT") or _port(own["JOB_ID"]),
    }


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's form, "2(x3),1" for 2, 2, 2 and 1."""
    counts: list[int] = []
    for tasks, _, nodes in re.findall(r"(\d+)(\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(nodes or 1)
    return counts


def _first_host(nodes: str) -> str:
    """The first name of a list in SLURM's form, such as "gpu[01-04,07]"."""
    if not re.search(r"[\[,]", nodes):
        return nodes
    try:
        names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"scontrol cannot name the nodes {nodes} ({error}): set MASTER_ADDR to the host of rank 0, and MASTER_PORT "
            "to a free port."
        ) from None
    return names.stdout.split()[0]


def _submitit_local(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of submitit's local executor; empty elsewhere, and for its only task."""
    tasks = env.get("SUBMITIT_LOCAL_NTASKS", "1")
    if _number(tasks) in (None, 1):
        return {}
    rank, local_rank = env["SUBMITIT_LOCAL_GLOBALID"], env["SUBMITIT_LOCAL_LOCALID"]
    ranks = {"RANK": rank, "WORLD_SIZE": tasks, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": tasks}
    return ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": _port(_number(env["SUBMITIT_LOCAL_JOB_ID"]))}


def _port(job: int | None) -> str:
    return str(_FIRST_PORT + (job or 0) % _PORTS)


def problems(env: Mapping[str, str]) -> Iterator[str]:
    """Messages about bad numbers, incomplete sets of variables, and several processes of an unknown launcher."""
    numbers: dict[str, int] = {}
    for name, low in _LEAST.items():
        if name in env:
            number = _number(env[name])
            if number is None or number < low:
                yield f"{name} is {env[name]!r}; it must be a whole number of at least {low}: {_REMEDY}."
            else:
                numbers[name] = number
    if any(name in env and name not in numbers for name in _LEAST):
        return
    if present := [name for name in (*_WORLD, *_MASTER) if name in env]:
        needed = _MASTER if set(present) <= set(_MASTER) else (*_WORLD, *_MASTER)
        if missing := [name for name in needed if name not in env]:
            yield f"{' and '.join(present)} {_is(present)} set, but {' and '.join(missing)} {_is(missing)} not: {_REMEDY}."
            return
    if "MASTER_ADDR" in env and not env["MASTER_ADDR"].strip():
        yield f"MASTER_ADDR is empty; it must name the host of rank 0: {_REMEDY}."
    if numbers.get("MASTER_PORT", 1) > 65535:
        yield f"MASTER_PORT is {numbers['MASTER_PORT']}; it must be at most 65535: {_REMEDY}."
    for rank, size in (_WORLD, ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            yield f"{rank} is {numbers[rank]}, but {size} is {numbers[size]}; ranks go from 0 to {numbers[size] - 1}: {_REMEDY}."
    if "RANK" not in env:
        yield from _without_torchrun(env)


def _without_torchrun(env: Mapping[str, str]) -> Iterator[str]:
    """A message if MPI's launcher started several processes, each of which would be a world of one."""
    for launcher, name in _LAUNCHERS.items():
        if (count := _number(env.get(name, ""))) and count > 1:
            yield (
                f"{launcher} started {count} processes, each of which would be a run of its own in the same folder: start them "
                "with torchrun or srun (see docs/tutorials/slurm.md)."
            )
            return


def _number(text: str) -> int | None:
    return int(text) if text.strip().lstrip("-").isdecimal() else None


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def is_rank_zero() -> bool:
    """Whether this is the first process, by RANK; it alone runs the stages that need no torch.distributed."""
    return int(os.environ.get("RANK", 0)) == 0
