"""A training stage from its opened checkpoints to its finished folders: what launch/correct.py and launch/distill.py share."""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from minitron_mcore.checkpoint import lineage, run_folder
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.identity import run_identity
from minitron_mcore.config.settings import DistillConfig
from minitron_mcore.config.stages import CacheKind, StageRun
from minitron_mcore.data import datasets
from minitron_mcore.distill import loop, vocabulary
from minitron_mcore.distill.cache import Cache
from minitron_mcore.distill.trainer import Trainer, check, fingerprint
from minitron_mcore.errors import UserError
from minitron_mcore.models import layer_spec
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import Batch
from minitron_mcore.reporting import plots, tables

TEACHER_LOSS_WARN_RATIO = 0.9
"""A teacher whose loss is more than this share of a blind guess's, ln(vocabulary), is warned of."""


def train(
    configs: Sequence[StageRun],
    settings: DistillConfig,
    students: Sequence[Checkpoint],
    teacher: Checkpoint | None,
    eval_steps: Sequence[int] = (),
    on_eval: Callable[[int, Trainer], None] | None = None,
) -> None:
    """Train `students[i]` into `configs[i].out_dir`, or go on where a stopped run ended (collective).

    Several are trained in turn, step by step, from one pass of the teacher; each folder is then what a run of its own would
    have made of it. The configs differ in `student` and `out_dir` alone.

    Args:
        looks: steps, ascending up to the last, after which the run is saved and `look` is called with each student's number and
            trainer; a run that goes on right after one of them looks again.

    Raises:
        UserError: see `train.check`, `data.prepare`, `Cache.check` and `checkpoint.claimed`; students of several vocabularies.
    """
    config, first = configs[0], students[0]
    check_run(config, settings, students, teacher)
    with contextlib.ExitStack() as claims:
        held = [run_folder.claim_run_folder(each.out_dir, run_identity(each), resume=True) for each in configs]
        resumed = [claims.enter_context(claim) for claim in held]
        process_groups.log(layer_spec.describe())
        vocab = vocabulary.shared(first.arch, teacher and teacher.arch)
        prefixes, weights = datasets.prepare(config.data, first.hf, vocab)
        text = {"files": config.data.train, "hash": datasets.data_hash(prefixes)}
        if isinstance(teacher, Cache):
            teacher.check(prefixes, weights, config.data.seed, settings.steps * settings.global_batch)
        trainers: dict[Path, Trainer] = {}
        for each, student, goes_on in zip(configs, students, resumed, strict=True):
            source = next((trainer.teacher for trainer in trainers.values()), None)
            trainer = Trainer(
                student, teacher, settings, config.parallel, config.dtype.value, source, config.performance
            )
            trainers[Path(each.out_dir)] = trainer
            if goes_on:
                trainer.resume(run_folder.open_checkpoint(each.out_dir))
                process_groups.log(f"going on after step {trainer.step} of {each.out_dir}")
            _describe(each, settings, student, teacher, text)
        behind = min(trainers.values(), key=lambda trainer: trainer.step)
        batches = behind.train_batches(config.data, prefixes, weights)
        if behind.teacher and behind.step == 0 and not (isinstance(teacher, Cache) and teacher.kind == CacheKind.topk):
            batches = _probed(behind, batches, vocab)
        figures = [[] for _ in trainers]
        for stop in eval_steps or (settings.stop_after,):
            for trainer in trainers.values():
                trainer.config = dataclasses.replace(settings, stop_after=stop)
            for before, new in zip(figures, loop.train(trainers, batches, _common(configs)), strict=True):
                before += new
            for number, trainer in enumerate(trainers.values()):
                if on_eval and trainer.step == stop:
                    on_eval(number, trainer)
            if on_eval and behind.step < stop:  # told to stop
                break
        for (folder, trainer), student, rows in zip(trainers.items(), students, figures, strict=True):
            if trainer.step == settings.steps:
                run_folder.finish(folder)
            _show(folder, student, rows)


def check_run(
    config: StageRun, settings: DistillConfig, students: Sequence[Checkpoint], teacher: Checkpoint | None
) -> None:
    """Raises UserError: see `train.check`; students of several vocabularies."""
    first = students[0]
    for student in students:
        check(student, teacher, settings, config.parallel, config.dtype.value, config.performance)
        if student.arch.vocab != first.arch.vocab:
            raise UserError(
                f"{student.path} has a vocabulary of {student.arch.vocab} and {first.path} one of {first.arch.vocab}: students "
                "of one pass of the teacher share the rows of its head; train these in runs of their own."
            )


def _probed(trainer: Trainer, batches: Iterator[Batch], vocab: int) -> Iterator[Batch]:
    """The same batches, after a look at how well the teacher predicts the first of them (collective)."""
    first = next(batches)
    loss, guess = trainer.teacher_loss(first), math.log(vocab)
    told = f"the teacher's own loss on the first micro-batch is {loss:.3f} nats a token"
    if not loss < TEACHER_LOSS_WARN_RATIO * guess:
        told = f"warning: {told}, near the {guess:.2f} of a blind guess: is it the right checkpoint, and text of its tokenizer?"
    process_groups.log(told)
    return itertools.chain([first], batches)


def _common(configs: Sequence[StageRun]) -> Path:
    """The folder of one run, or the one that those of several share."""
    return Path(os.path.commonpath([config.out_dir for config in configs]))


def _describe(
    config: StageRun, settings: DistillConfig, student: Checkpoint, teacher: Checkpoint | None, text: dict
) -> None:
    """Write the lineage of what will be trained (rank 0)."""
    parents = {"student": run_folder.identity(student), "teacher": teacher and run_folder.identity(teacher)}
    details = {
        "plans": lineage.plans(student.path),
        "settings": dataclasses.asdict(settings),
        "data": text,
        "ancestry": student.lineage,
        "teacher": teacher and teacher.lineage,
    }
    name = fingerprint(student, teacher, run_identity(config), text["hash"])
    run_folder.describe(config.out_dir, student.arch, name, parents, student.hf, **details)


def _show(folder: Path, student: Checkpoint, figures: list[dict[str, float]]) -> None:
    if process_groups.rank() == 0 and figures:
        plots.plot_losses({folder.name: folder / "metrics.jsonl"}, folder / "losses.png")
        notes = [f"checkpoint: {folder}", f"curve: {folder}/losses.png"]
        tables.table(f"trained {student.path}", loop.summary(figures), notes)
