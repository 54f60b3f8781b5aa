"""The stages of a recipe in order, each in processes or a SLURM job of its own. Imports no torch."""

import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minitron_mcore.checkpoint import stage_record
from minitron_mcore.cli import stage_process
from minitron_mcore.cli.compose import compose, group_options, search_path
from minitron_mcore.config.identity import differences, resolved
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.config.stages import STAGES, DistillRun, EvaluateRun, ExportRun, PipelineRun, StageRun
from minitron_mcore.data.blend import parse_blend
from minitron_mcore.errors import STOPPED_STATUS, Stopped, UserError, refuse
from minitron_mcore.reading import read_yaml

INPUTS = ("source", "scores", "study", "plan", "student")
"""Settings that name the folder of an earlier stage, besides the teacher or teachers."""
FINAL_STAGES = ("export", "evaluate")
ONE_PROCESS_STAGES = ("plan", "export", "evaluate")
RESUMED_STAGES = ("depth", "correct", "teacher_cache", "distill")
"""Stages that continue an unfinished folder; the others begin it anew."""
UNSHARDED = [f"parallel.{axis}={size}" for axis, size in vars(ParallelConfig()).items()]
"""The layout for evaluation by transformers, which runs on one process."""
_DISTILL = ("students=", "teachers=")
"""Settings that only distill has."""
_OWN = ("processes=", "stages=", "submit=", *_DISTILL)
"""Settings that not all stages have."""


class Step(NamedTuple):
    """A stage of a pipeline."""

    name: str
    line: list[str]
    """Its overrides."""
    run: StageRun

    @property
    def folders(self) -> dict[Path, StageRun]:
        """The folders that the stage writes: one, or one for each student."""
        runs = self.run.each() if isinstance(self.run, DistillRun) else [self.run]
        return {Path(run.out_dir): run for run in runs}

    @property
    def inputs(self) -> set[Path]:
        """Folders of earlier stages that this one reads."""
        paths = (path for run in self.folders.values() for path in _inputs(run))
        return {Path(path) for path in paths if path}


def _inputs(run: StageRun) -> Iterator[str | None]:
    yield from (getattr(run, name, None) for name in INPUTS)
    several = getattr(run, "teachers", None)
    yield from parse_blend(several, "teachers")[0] if several else [getattr(run, "teacher", None)]


def run_stage(name: str, *overrides: str, processes: int = 1, number: int = 1, total: int = 1) -> float:
    """Run launch/`name`.py in `processes` processes; print its number among all stages, and its command.

    Returns:
        seconds.

    Raises:
        UserError: the stage failed; its own message is printed before.
        Stopped: a signal stopped it.
    """
    print(f"\nstage {number} of {total}: {name}\n$ {stage_process.shown(name, overrides, processes)}", flush=True)
    start = time.monotonic()
    status = stage_process.run(name, overrides, processes)
    if status == STOPPED_STATUS:
        raise Stopped(f"minitron {name} stopped: the same command continues.")
    if status:
        raise UserError(f"minitron {name} failed with status {status}; its message stands above.")
    return time.monotonic() - start


def run(steps: list[Step], processes: int) -> list[dict[str, Any]]:
    """Run the stages that are not finished, the sharded ones in `processes` processes.

    Returns:
        rows of stage, seconds (None for a stage that was finished before) and folder.

    Raises:
        UserError: see `check`; a stage that failed or stopped early.
    """
    check(steps)
    rows = []
    for number, step in enumerate(steps, 1):
        seconds = None
        refuse(_problems(step))  # again: earlier stages may have changed the inputs
        if not is_finished(step):
            count = 1 if step.name in ONE_PROCESS_STAGES else processes
            seconds = run_stage(step.name, *search_path(), *step.line, processes=count, number=number, total=len(steps))
        if not is_finished(step):
            raise UserError(f"minitron {step.name} stopped before its end: the same command resumes.")
        rows.append({"stage": step.name, "seconds": seconds, "folder": step.run.out_dir})
    return rows


def submit(steps: list[Step], sbatch: str) -> list[dict[str, Any]]:
    """Queue a SLURM job for each stage that is not finished; each starts when the one before has ended with status 0.

    The command `sbatch`, with options and a script, receives the stage's overrides, and in its environment STAGE and, for stages of
    one process, PROCESSES=1.

    Returns:
        rows of stage, job (None for a finished stage) and folder.

    Raises:
        UserError: see `check`; the command fails or prints no job.
    """
    check(steps)
    program, *options = shlex.split(sbatch)
    rows: list[dict[str, Any]] = []
    job = None
    for step in steps:
        rows.append({"stage": step.name, "job": None, "folder": step.run.out_dir})
        if is_finished(step):
            continue
        settings = {"STAGE": step.name} | ({"PROCESSES": "1"} if step.name in ONE_PROCESS_STAGES else {})
        after: list[str] = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"] if job else []
        command = [program, "--parsable", f"--job-name={step.name}", *after, *options, *search_path(), *step.line]
        print(f"$ {' '.join(f'{key}={value}' for key, value in settings.items())} {shlex.join(command)}", flush=True)
        try:
            done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"{program} cannot be started ({error.strerror}): submit names SLURM's sbatch.") from error
        job = done.stdout.strip().partition(";")[0]
        if done.returncode or not job.isdecimal():
            reason = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
            raise UserError(f"{program} did not queue {step.name} ({reason}); the jobs before it stay queued.")
        rows[-1]["job"] = int(job)
    return rows


def plan(config: PipelineRun, overrides: list[str]) -> list[Step]:
    """The stages that a recipe needs, in order.

    Args:
        overrides: the command line, which all stages receive.

    Raises:
        UserError: an unknown stage, or a config that cannot be composed.
    """
    if unknown := set(config.stages) - set(STAGES):
        raise UserError(f"stages names {', '.join(sorted(unknown))}: give some of {', '.join(STAGES)}.")
    shared = [override for override in overrides if not override.startswith(_OWN)]
    more = {"distill": [override for override in overrides if override.startswith(_DISTILL)], "evaluate": UNSHARDED}
    steps: list[Step] = []
    for name in STAGES:
        step = _step(name, [*shared, *more.get(name, [])])
        steps += _for_each_student(step, config.students) if config.students and name in FINAL_STAGES else [step]
    return _needed(config, steps)


def _step(name: str, line: list[str]) -> Step:
    return Step(name, line, compose(name, line))


def _for_each_student(step: Step, students: dict[str, str]) -> Iterator[Step]:
    """The stage for each student's folder: distill/NAME is exported to hf_NAME, which is evaluated in evaluate_NAME."""
    for name in students:
        assert isinstance(step.run, ExportRun | EvaluateRun)
        source = f"{step.run.source}/{name}" if step.name == "export" else f"{step.run.source}_{name}"
        yield _step(step.name, [*step.line, f"source={source}", f"out_dir={step.run.out_dir}_{name}"])


def _needed(config: PipelineRun, steps: list[Step]) -> list[Step]:
    """Those in `config.stages`; without these the final stages and all whose folders another needed stage reads."""
    if config.stages:
        return [step for step in steps if step.name in config.stages]
    final = FINAL_STAGES if config.data.heldout else FINAL_STAGES[:1]
    needed: list[Step] = []
    read: set[Path] = set()
    for step in reversed(steps):
        if step.name in final or read & step.folders.keys():
            needed.insert(0, step)
            read |= step.inputs
    return needed


def is_finished(step: Step) -> bool:
    """Whether all folders of a stage hold the complete result of its run."""
    return all(map(_is_finished, step.folders.values()))


def _is_finished(run: StageRun) -> bool:
    return stage_record.is_complete(run.out_dir) and not _changed_settings(run)


def _changed_settings(run: StageRun) -> list[str]:
    """Settings of a run that differ from those in its folder."""
    folder = Path(run.out_dir)
    return differences(read_yaml(folder / "config.yaml", f"remove {folder} and run again"), resolved(run))


def check(steps: list[Step]) -> None:
    """Check all stages before the first one starts.

    Raises:
        UserError: an input that no stage here writes and that is not finished; a folder that was made with other settings or from
            other inputs than the present ones; a finished folder with damaged files.
    """
    written = {folder for step in steps for folder in step.folders}
    for step in steps:
        for path in step.inputs - written:
            _check_input(path, step.name)
    refuse(problem for step in steps for problem in _problems(step))


def _check_input(path: Path, reader: str) -> None:
    """Refuse an unfinished input of the stage `reader`."""
    if stage_record.is_complete(path):
        return refuse(stage_record.damaged_outputs(path))
    recipe = path.parent.name
    maker = f"+recipe={recipe}" if recipe in group_options("recipe") else "with the previous stages"
    raise UserError(
        f"{path}, which minitron {reader} reads, does not exist or is not finished: run minitron pipeline {maker} first, or name "
        "other folders (recipe.source=/path recipe.teacher=/path)."
    )


def _problems(step: Step) -> Iterator[str]:
    """Changed settings and inputs of a stage whose folder will be kept, and damaged outputs of one that has finished."""
    for folder, run in step.folders.items():
        complete, sentences = stage_record.is_complete(folder), []
        if complete or (step.name in RESUMED_STAGES and (folder / "config.yaml").is_file()):
            if settings := _changed_settings(run):
                remedy = f"give the old values, another work_dir, or remove {folder} and run again"
                sentences.append(f"{folder} holds another run ({'; '.join(settings)}): {remedy}.")
            if (folder / stage_record.INPUTS).is_file():
                sentences += stage_record.changed_inputs(folder, stage_record.inputs(resolved(run)))
        if complete:
            sentences += stage_record.damaged_outputs(folder)
        yield from (f"minitron {step.name}: {sentence}" for sentence in sentences)
