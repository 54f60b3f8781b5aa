"""A training stage from its opened checkpoints to its finished folder: what launch/correct.py and launch/distill.py share."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from minitron_mcore import ancestry, checkpoint, data, pictures, report, runtime
from minitron_mcore.checkpoint import Checkpoint
from minitron_mcore.config import DistillConfig
from minitron_mcore.distill import train, vocabulary
from minitron_mcore.distill.cache import Cache
from minitron_mcore.launching import plain
from minitron_mcore.models import spec
from minitron_mcore.runs import StageRun


def run(
    config: StageRun,
    settings: DistillConfig,
    student: Checkpoint,
    teacher: Checkpoint | None,
    looks: Sequence[int] = (),
    look: Callable[[train.Trainer], None] | None = None,
) -> None:
    """Train `student` into `config.out_dir`, or go on where a stopped run ended (collective).

    Args:
        looks: steps, ascending up to the last, after which the run is saved and `look` is called with its trainer; a run that
            goes on right after one of them looks again.

    Raises:
        UserError: see `train.check`, `data.prepare`, `Cache.check` and `checkpoint.claimed`.
    """
    out_dir = Path(config.out_dir)
    train.check(student, teacher, settings, config.parallel)
    with checkpoint.claimed(out_dir, plain(config), resume=True) as resumed:
        runtime.log(spec.describe())
        prefixes, weights = data.prepare(
            config.data, student.hf, vocabulary.shared(student.arch, teacher and teacher.arch)
        )
        if isinstance(teacher, Cache):
            teacher.check(prefixes, weights, config.data.seed, settings.steps * settings.global_batch)
        trainer = train.Trainer(student, teacher, settings, config.parallel, config.dtype.value)
        if resumed:
            trainer.resume(checkpoint.open_checkpoint(out_dir))
            runtime.log(f"going on after step {trainer.step} of {out_dir}")
        parents = {"student": checkpoint.identity(student), "teacher": teacher and checkpoint.identity(teacher)}
        text = {"files": config.data.train, "hash": data.data_hash(prefixes)}
        name = train.fingerprint(student, teacher, plain(config), text["hash"])
        lineages = {"ancestry": student.lineage, "teacher": teacher and teacher.lineage}
        details = {
            "plans": ancestry.plans(student.path),
            "settings": dataclasses.asdict(settings),
            "data": text,
            **lineages,
        }
        checkpoint.describe(out_dir, student.arch, name, parents, student.hf, **details)
        batches = data.train_batches(prefixes, weights, **trainer.data_position(config.data))
        figures = []
        for stop in looks or (settings.stop_after,):
            trainer.config = dataclasses.replace(settings, stop_after=stop)
            figures += train.train(trainer, batches, out_dir)
            if look and trainer.step == stop:
                look(trainer)
            elif look and trainer.step < stop:  # told to stop
                break
        if trainer.step == settings.steps:
            checkpoint.finish(out_dir)
        if runtime.rank() == 0 and figures:
            pictures.plot_losses({out_dir.name: out_dir / "metrics.jsonl"}, out_dir / "losses.png")
            report.table(
                f"trained {student.path}",
                train.summary(figures),
                [f"checkpoint: {out_dir}", f"curve: {out_dir}/losses.png"],
            )
