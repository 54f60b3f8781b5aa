"""The training of launch/correct.py and launch/distill.py: from opened checkpoints to finished run folders."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from minitron_mcore.checkpoint import claim, lineage, run_folder
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.identity import resolved, run_identity
from minitron_mcore.config.settings import DataConfig, DistillConfig
from minitron_mcore.config.stages import CacheKind, StageRun
from minitron_mcore.data import blend, datasets, token_cache
from minitron_mcore.distill import checks, failures, heldout, loop, phases, teachers, vocabulary
from minitron_mcore.distill.cache import Cache
from minitron_mcore.distill.heldout import HeldOutText
from minitron_mcore.distill.trainer import Trainer, check
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.models import layer_spec, tuning
from minitron_mcore.parallel import process_groups, stop_signal
from minitron_mcore.parallel.schedule import Batch
from minitron_mcore.reading import damage_as_user_error, read_json
from minitron_mcore.reporting import plots, tables


class StudentAnswers(Protocol):
    """Answers of the student in training (`evaluation.on_policy`)."""

    @property
    def digest(self) -> str:
        """Identifies the prompts."""

    def batches(self, trainer: Trainer, text: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of `text`, with answers in the place of samples."""


TEACHER_LOSS_WARN_RATIO = 0.9
"""Warn when the teacher's loss exceeds this fraction of ln(vocab_size), the loss of uniform predictions."""


def train(
    configs: Sequence[StageRun],
    settings: DistillConfig,
    students: Sequence[Checkpoint],
    teacher: Checkpoint | None,
    heldout_text: HeldOutText | None = None,
    answers: StudentAnswers | None = None,
) -> None:
    """Train `students[i]` into `configs[i].out_dir`, or resume a stopped run (collective).

    Several students share the teacher's passes; each result equals that of a separate run. The configs differ only in `student`
    and `out_dir`.

    Args:
        heldout_text: measured every `settings.eval_every` steps.
        answers: of the one student, for `settings.on_policy`.

    Raises:
        UserError: see `check_run`, `token_cache.prepare`, `Cache.check` and `claim.claim_run_folder`.
        Stopped: on all ranks, after a signal; all students are saved.
    """
    config, first = configs[0], students[0]
    check_run(config, settings, students, teacher)
    with contextlib.ExitStack() as claims:
        folders = [claim.claim_run_folder(each.out_dir, resolved(each)) for each in configs]
        resumed = [claims.enter_context(folder) for folder in folders]
        trainers: dict[Path, Trainer] = {}
        common_folder = Path(os.path.commonpath([each.out_dir for each in configs]))
        running = lambda: 1 + min((trainer.step for trainer in trainers.values()), default=-1)  # noqa: E731
        claims.enter_context(failures.hangs_reported(running, common_folder))
        refuse(
            f"{checks.prefix_of(config)}phase is {settings.phase}, but {each.out_dir} has no checkpoint yet: begin with phase 0."
            for each, is_resumed in zip(configs, resumed, strict=True)
            if settings.phase and not is_resumed
        )
        process_groups.log(layer_spec.describe())
        vocab = vocabulary.shared(first.arch, teacher and teacher.arch)
        prefixes, weights = token_cache.prepare(config.data, first.hf, vocab)
        text = _text(config.data, prefixes, answers)
        if isinstance(teacher, Cache):
            samples = teacher.index["samples"] if settings.phase else settings.steps * settings.global_batch
            teacher.check(prefixes, weights, config.data, samples)
        for each, student, is_resumed in zip(configs, students, resumed, strict=True):
            source = next((trainer.teacher for trainer in trainers.values()), None)
            trainer = Trainer(
                student, teacher, settings, config.parallel, config.dtype.value, source, config.performance
            )
            trainers[Path(each.out_dir)] = trainer
            if is_resumed:
                trainer.resume(Path(each.out_dir))
                process_groups.log(f"resuming after step {trainer.step} of {each.out_dir}")
            _describe(each, trainer, student, teacher, text, is_resumed)
        if len({trainer.phases[-1] for trainer in trainers.values()}) > 1:
            raise UserError(
                "the students' checkpoints are of different steps, at which no common phase can begin: resume each alone."
            )
        behind = min(trainers.values(), key=lambda trainer: trainer.step)
        batches = behind.train_batches(config.data, prefixes, weights)
        if behind.teacher and behind.step == 0 and not (isinstance(teacher, Cache) and teacher.kind == CacheKind.topk):
            batches = _check_teacher_loss(behind, batches, vocab)
        batches = answers.batches(behind, batches) if answers else batches
        figures = loop.train(trainers, batches, common_folder, heldout_text, config.log)
        is_stopped = behind.step < min(settings.steps, settings.stop_after or settings.steps)
        with process_groups.raise_on_all_ranks(), claim.writing(common_folder):
            for (folder, trainer), student, rows in zip(trainers.items(), students, figures, strict=True):
                _show(folder, student, rows)
                if trainer.step == settings.steps:
                    claim.finish(folder)  # after the last file, since it lists them
        if is_stopped:
            raise stop_signal.stopped(f"after step {behind.step} of {settings.steps}, which is saved")


def _text(data: DataConfig, prefixes: Sequence[str], answers: StudentAnswers | None) -> dict:
    """Files and hash of what a run reads."""
    files = blend.split_entries(data.train, data.splits_file)
    return {
        "files": files,
        "hash": datasets.data_hash(prefixes) + (f" and prompts {answers.digest}" if answers else ""),
    }


def check_run(
    config: StageRun, settings: DistillConfig, students: Sequence[Checkpoint], teacher: Checkpoint | None
) -> None:
    """
    Raises:
        UserError: see `trainer.check`, `checks.document_problems` and `checks.heldout_problems`; students with different
            vocabularies.
    """
    first, live = students[0], [] if isinstance(teacher, Cache) else teachers.members(teacher)
    refuse(checks.document_problems(config.data, tuning.available_kernels()))
    refuse(checks.on_policy(settings, config.performance, len(students)))
    for student in students:
        for each in live or [None]:
            refuse(checks.heldout_problems(config, settings, student.arch, each and each.arch))
        options = config.parallel, config.dtype.value, config.performance, checks.prefix_of(config)
        check(student, teacher, settings, *options)
        if student.arch.vocab != first.arch.vocab:
            raise UserError(
                f"{student.path} has a vocabulary of {student.arch.vocab} and {first.path} one of {first.arch.vocab}: students "
                "of one pass of the teacher share the rows of its head; train these in separate runs."
            )


def _check_teacher_loss(trainer: Trainer, batches: Iterator[Batch], vocab: int) -> Iterator[Batch]:
    """Log the teacher's loss on the first batch, with a warning if it is too high; the same batches (collective)."""
    first = next(batches)
    losses, uniform = trainer.teacher_losses(first), math.log(vocab)
    message = f"the teacher's own loss on the first micro-batch is {' and '.join(f'{loss:.3f}' for loss in losses)} nats a token"
    if not all(loss < TEACHER_LOSS_WARN_RATIO * uniform for loss in losses):
        message = (
            f"warning: {message}, close to ln(vocab_size) = {uniform:.2f}, the loss of uniform predictions: check the teacher's "
            "checkpoint and tokenizer."
        )
    process_groups.log(message)
    return itertools.chain([first], batches)


def _describe(
    config: StageRun,
    trainer: Trainer,
    student: Checkpoint,
    teacher: Checkpoint | None,
    text: dict,
    is_resumed: bool,
) -> None:
    """Write the lineage of the model that will be trained (rank 0).

    Raises:
        UserError: the tokens are not those of the run's earlier steps.
    """
    parents = {"student": run_folder.identity(student), "teacher": teacher and run_folder.identity(teacher)}
    details = {}
    if isinstance(teacher, teachers.Several):
        parents["teacher"]["weight"] = teacher.weights[0]
        for n, (other, weight) in enumerate(zip(teacher.others, teacher.weights[1:], strict=True), 2):
            parents[f"teacher {n}"] = run_folder.identity(other) | {"weight": weight}
            details[f"teacher {n}"] = other.lineage
    details |= {
        "plans": lineage.plans(student.path),
        "settings": dataclasses.asdict(trainer.config),
        "phases": phases.values(trainer.phases),
        "data": text,
        "ancestry": student.lineage,
        "teacher": teacher and teacher.lineage,
    }
    identity, earlier = run_identity(config), Path(config.out_dir) / "model.json"
    name = fingerprint(student, teacher, identity, text)
    if is_resumed and earlier.is_file():  # its name stays within a phase, though a later version may add settings
        with damage_as_user_error(earlier, "restore it"):
            model = read_json(earlier, "restore it")
            before, known = model["fingerprint"], len(model["lineage"].get("phases", [None]))
            trained = model["lineage"]["data"]["hash"]
        if trained != text["hash"]:  # also where the files are the same, but not the tokenizer
            raise UserError(
                f"{config.out_dir} was trained on tokens {trained}, but the text and the tokenizer now give {text['hash']}: "
                "restore them, or choose another out_dir."
            )
        is_new = len(trainer.phases) > known
        name = fingerprint(student, teacher, identity | {"before": before}, text) if is_new else before
    run_folder.describe(config.out_dir, student.arch, name, parents, student.hf, **details)


def fingerprint(student: Checkpoint, teacher: Checkpoint | None, identity: dict, text: dict) -> str:
    """A hash of everything that determines a trained model: the same for all paths, layouts and intervals."""
    names = ("kind", "top_k", "tail_draws", "dtype")
    kind = {key: teacher.index[key] for key in names if key in teacher.index} if isinstance(teacher, Cache) else None
    weights = blend.parse_blend(text["files"])[1]
    inputs = [student.fingerprint, teacher and teacher.fingerprint, kind, identity, weights, text["hash"]]
    if isinstance(teacher, teachers.Several):
        inputs += [teacher.weights, [other.fingerprint for other in teacher.others]]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _show(folder: Path, student: Checkpoint, figures: list[dict[str, float]]) -> None:
    if process_groups.rank() == 0 and figures:
        plots.plot_losses({folder.name: folder / "metrics.jsonl"}, folder / "losses.png")
        notes = [f"checkpoint: {folder}", f"curve: {folder}/losses.png"]
        if measured := heldout.losses(folder):
            lowest = heldout.lowest_step(measured)
            notes.append(f"lowest held-out loss: {measured[lowest]:.4f} nats a token, after step {lowest}")
        tables.table(f"trained {student.path}", loop.summary(figures), notes)
