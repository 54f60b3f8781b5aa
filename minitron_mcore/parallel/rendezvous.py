"""Checks of the environment variables that a launcher (torchrun, srun, mpirun) sets for each process. Imports no torch."""

import os
from collections.abc import Iterator, Mapping

from minitron_mcore.errors import refuse

_WORLD = ("RANK", "WORLD_SIZE")
_MASTER = ("MASTER_ADDR", "MASTER_PORT")
_LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
_LAUNCHERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}
_REMEDY = "start with torchrun, which sets them all, or unset them"


def check(env: Mapping[str, str] = os.environ) -> None:
    """Raise a UserError with the `problems` of the environment."""
    refuse(problems(env))


def problems(env: Mapping[str, str]) -> Iterator[str]:
    """Messages about bad numbers, incomplete sets of variables, and several processes without torchrun."""
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
    """A message if a launcher started several processes without rank variables: each would be a world of one."""
    counts = {launcher: _number(env.get(name, "")) for launcher, name in _LAUNCHERS.items()}
    # A batch script is one process, but also has SLURM_NTASKS; only srun's processes have the variables of a step.
    if "SLURM_PROCID" in env and counts["srun"] is None and env.get("ENVIRONMENT") != "BATCH":
        counts["srun"] = _number(env.get("SLURM_NTASKS", env.get("SLURM_NPROCS", "")))
    for launcher, count in counts.items():
        if count and count > 1:
            yield (
                f"{launcher} started {count} processes without torchrun, each of which would be a run of its own in the same "
                f"folder: start torchrun, one a node ({launcher} ... torchrun --nproc-per-node N; see launch/slurm/distill.sbatch)."
            )
            return


def _number(text: str) -> int | None:
    return int(text) if text.strip().lstrip("-").isdecimal() else None


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def is_rank_zero() -> bool:
    """Whether this is the first process, by RANK; it alone runs the stages that need no torch.distributed."""
    return int(os.environ.get("RANK", 0)) == 0
