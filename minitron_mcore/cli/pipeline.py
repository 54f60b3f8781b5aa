"""The stages of a recipe in order, each in its own processes."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.run_folder import COMPLETE
from minitron_mcore.cli.compose import LAUNCH, compose, group_options, search_path
from minitron_mcore.config.identity import differences, resolved
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.config.stages import STAGES, PipelineRun, StageRun
from minitron_mcore.errors import UserError
from minitron_mcore.reading import read_yaml

INPUTS = ("source", "scores", "study", "plan", "student", "teacher")
"""Settings that name the folder of an earlier stage."""
FINAL_STAGES = ("export", "evaluate")
ONE_PROCESS_STAGES = ("plan", "export", "evaluate")
UNSHARDED = [f"parallel.{axis}={size}" for axis, size in vars(ParallelConfig()).items()]
"""The layout for evaluation by transformers, which runs on one process."""


def run_stage(name: str, *overrides: str, processes: int = 1, number: int = 1, total: int = 1) -> float:
    """Run launch/`name`.py in `processes` processes; print its number among all stages, and its command.

    Returns:
        seconds.

    Raises:
        UserError: the stage failed; its own message is printed before.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(LAUNCH / f"{name}.py"), *overrides]
    shown = ["minitron", name, *(["--nproc", str(processes)] if processes > 1 else []), *overrides]
    print(f"\nstage {number} of {total}: {name}\n$ {shlex.join(shown)}", flush=True)
    threads = max(1, (os.cpu_count() or 1) // processes)
    start = time.monotonic()
    status = subprocess.run(command, env={"OMP_NUM_THREADS": str(threads)} | os.environ).returncode
    if status:
        raise UserError(f"minitron {name} failed with status {status}; its message stands above.")
    return time.monotonic() - start


def run(config: PipelineRun, overrides: list[str]) -> list[dict[str, Any]]:
    """Run the stages of a recipe that are not finished.

    Args:
        overrides: the command line, which all stages receive.

    Returns:
        rows of stage, seconds (None for a stage that was finished before) and folder.

    Raises:
        UserError: an unknown stage, an input that no stage here writes, a folder older than its input, a stage that failed or
            stopped early.
    """
    lines, runs = plan(config, overrides)
    for name, run in runs.items():
        for path in _inputs(run) - {Path(each.out_dir) for each in runs.values()}:
            _check_input(path, name)
    rows = []
    for number, (name, run) in enumerate(runs.items(), 1):
        seconds = None
        _check_order(run)
        if not is_finished(run):
            processes = 1 if name in ONE_PROCESS_STAGES else config.processes
            command = [*search_path(), *lines[name]]
            seconds = run_stage(name, *command, processes=processes, number=number, total=len(runs))
        if not is_finished(run):
            raise UserError(f"minitron {name} stopped before its end: the same command resumes.")
        rows.append({"stage": name, "seconds": seconds, "folder": run.out_dir})
    return rows


def plan(config: PipelineRun, overrides: list[str]) -> tuple[dict[str, list[str]], dict[str, StageRun]]:
    """Command line and config of each stage that a recipe needs."""
    lines = {name: [*overrides, *(UNSHARDED if name == "evaluate" else [])] for name in STAGES}
    runs = {name: compose(name, line) for name, line in lines.items()}
    return lines, {name: runs[name] for name in _needed(config, runs)}


def _needed(config: PipelineRun, runs: dict[str, StageRun]) -> list[str]:
    """The stages in `config.stages`; without these the final stages and all whose folders another needed stage reads."""
    unknown = set(config.stages) - set(STAGES)
    if unknown:
        raise UserError(f"stages names {', '.join(sorted(unknown))}: give some of {', '.join(STAGES)}.")
    if config.stages:
        return [name for name in STAGES if name in config.stages]
    final = FINAL_STAGES if config.data.heldout else FINAL_STAGES[:1]
    needed: list[str] = []
    read: set[Path] = set()
    for name in reversed(STAGES):
        if name in final or Path(runs[name].out_dir) in read:
            needed.insert(0, name)
            read |= _inputs(runs[name])
    return needed


def _inputs(run: StageRun) -> set[Path]:
    return {Path(path) for name in INPUTS if (path := getattr(run, name, None))}


def is_finished(run: StageRun) -> bool:
    """Whether a stage's folder holds the complete result of this run."""
    folder = Path(run.out_dir)
    remedy = f"remove {folder} and run again"
    return (folder / COMPLETE).is_file() and not differences(read_yaml(folder / "config.yaml", remedy), resolved(run))


def _check_input(path: Path, reader: str) -> None:
    """Refuse an unfinished input of the stage `reader`."""
    if (path / COMPLETE).is_file():
        return
    recipe = path.parent.name
    maker = f"+recipe={recipe}" if recipe in group_options("recipe") else "with the previous stages"
    raise UserError(
        f"{path}, which minitron {reader} reads, does not exist or is not finished: run minitron pipeline {maker} first, or name "
        "other folders (recipe.source=/path recipe.teacher=/path)."
    )


def _check_order(run: StageRun) -> None:
    """Refuse a folder, finished or not, that was begun before one of its inputs was finished."""
    marks = [Path(run.out_dir) / name for name in (COMPLETE, "latest")]
    begun = min((mark.stat().st_mtime for mark in marks if mark.is_file()), default=float("inf"))
    for path in _inputs(run):
        if (path / COMPLETE).stat().st_mtime > begun:
            raise UserError(
                f"{run.out_dir} was begun before its input {path} was last written: remove {run.out_dir} and run again."
            )
