"""Launch files one after another, each in processes of its own, as a person would start them."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from minitron_mcore.checkpoint import COMPLETE
from minitron_mcore.config import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.launching import CONF, compose, plain
from minitron_mcore.reading import read_yaml
from minitron_mcore.runs import STAGES, PipelineRun, StageRun

LAUNCH = Path(__file__).parents[1] / "launch"
INPUTS = ("source", "scores", "study", "plan", "student", "teacher")
ENDS = ("export", "evaluate")
ALONE = ("plan", "export", "evaluate")
"""Stages of one process."""
WHOLE = [f"parallel.{axis}={size}" for axis, size in vars(ParallelConfig()).items()]
"""transformers, which evaluates, shards nothing."""


def stage(name: str, *overrides: str, processes: int = 1) -> float:
    """Run launch/`name`.py with Hydra overrides, under torchrun if in several processes; prints the command, returns its seconds.

    Raises:
        UserError: the stage failed; its own sentence stands above.
    """
    sharded = ["--nproc-per-node", str(processes)] if processes > 1 else []
    torchrun = ["-m", "torch.distributed.run", "--standalone", *sharded] if sharded else []
    command = [sys.executable, *torchrun, str(LAUNCH / f"{name}.py"), *overrides]
    shown = ["torchrun" if sharded else "python", *sharded, f"launch/{name}.py", *overrides]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    threads = max(1, (os.cpu_count() or 1) // processes)
    start = time.monotonic()
    failed = subprocess.run(command, env={"OMP_NUM_THREADS": str(threads)} | os.environ).returncode
    if failed:
        raise UserError(f"launch/{name}.py failed with status {failed}; what went wrong stands above.")
    return time.monotonic() - start


def run(config: PipelineRun, overrides: list[str]) -> list[dict]:
    """Run the stages that a recipe needs and that are not finished.

    Args:
        overrides: the command line, which every stage gets.

    Returns:
        rows of stage, seconds (None where it was finished before) and folder.

    Raises:
        UserError: no such stage, an input that nothing here makes, a folder that is older than its input, a stage that failed or
            was told to stop.
    """
    lines, runs = plan(config, overrides)
    for name, run in runs.items():
        for path in _inputs(run) - {Path(other.out_dir) for other in runs.values()}:
            _check_there(path, name)
    rows = []
    for name, run in runs.items():
        seconds = None
        _check_fresh(run)
        if not finished(run):
            seconds = stage(name, *lines[name], processes=1 if name in ALONE else config.processes)
        if not finished(run):
            raise UserError(f"launch/{name}.py was told to stop before its end: the same command goes on from there.")
        rows.append({"stage": name, "seconds": seconds, "folder": run.out_dir})
    return rows


def plan(config: PipelineRun, overrides: list[str]) -> tuple[dict[str, list[str]], dict[str, StageRun]]:
    """Command line and config of each stage that a recipe needs."""
    lines = {name: [*overrides, *(WHOLE if name == "evaluate" else [])] for name in STAGES}
    runs = {name: compose(name, line) for name, line in lines.items()}
    return lines, {name: runs[name] for name in _chosen(config, runs)}


def _chosen(config: PipelineRun, runs: dict[str, StageRun]) -> list[str]:
    """The stages asked for; else the last ones and those whose folders a later one reads, so that a recipe whose teacher is not
    its own corrected one corrects none, and one that starts from another's student converts nothing."""
    unknown = set(config.stages) - set(STAGES)
    if unknown:
        raise UserError(f"stages names {', '.join(sorted(unknown))}: give some of {', '.join(STAGES)}.")
    if config.stages:
        return [name for name in STAGES if name in config.stages]
    ends = ENDS if config.data.heldout else ENDS[:1]
    chosen, read = [], set()
    for name in reversed(STAGES):
        if name in ends or Path(runs[name].out_dir) in read:
            chosen.insert(0, name)
            read |= _inputs(runs[name])
    return chosen


def _inputs(run: StageRun) -> set[Path]:
    return {Path(path) for name in INPUTS if (path := getattr(run, name, None))}


def finished(run: StageRun) -> bool:
    """Whether a stage's folder holds this very run, and whole."""
    folder = Path(run.out_dir)
    remedy = f"remove {folder} and run again"
    return (folder / COMPLETE).is_file() and read_yaml(folder / "config.yaml", remedy) == plain(run)


def _check_there(path: Path, reader: str) -> None:
    if (path / COMPLETE).is_file():
        return
    recipe = path.parent.name
    maker = f"+recipe={recipe}" if (CONF / "recipe" / f"{recipe}.yaml").is_file() else "with the stages before it"
    raise UserError(
        f"{path}, which launch/{reader}.py reads, is not there or not finished: run launch/pipeline.py {maker} first, or name "
        "other folders (recipe.source=/path recipe.teacher=/path)."
    )


def _check_fresh(run: StageRun) -> None:
    """Refuse a folder, whole or begun, that an input's finishing has overtaken."""
    marks = [Path(run.out_dir) / name for name in (COMPLETE, "latest")]
    made = min((mark.stat().st_mtime for mark in marks if mark.is_file()), default=float("inf"))
    for path in _inputs(run):
        if (path / COMPLETE).stat().st_mtime > made:
            raise UserError(
                f"{run.out_dir} was begun before {path} was made anew, which it reads: remove {run.out_dir} and run again."
            )
