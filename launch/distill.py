"""Train a pruned student on its teacher's distribution. The same command again goes on where a stopped run ended.

torchrun --nproc-per-node 8 launch/distill.py +model=llama31_8b parallel=tp8_sp data.train=[text.jsonl]
"""

from minitron_mcore.config import DistillRun
from minitron_mcore.launching import entry, plain


@entry("distill")
def main(config: DistillRun) -> None:
    from pathlib import Path

    from minitron_mcore import checkpoint, data, report, runtime
    from minitron_mcore.distill import train
    from minitron_mcore.models import spec

    settings, out_dir = config.distill, Path(config.out_dir)
    with runtime.distributed(config.parallel, config.seed, settings.sequence_length):
        student = checkpoint.open_checkpoint(config.student, "student")
        teacher = checkpoint.open_checkpoint(config.teacher, "teacher") if settings.kd_weight else None
        train.check(student, teacher, settings, runtime.dp_group().size())
        with checkpoint.claimed(out_dir, plain(config), resume=True) as resumed:
            runtime.log(spec.describe())
            prefixes, weights = data.prepare(config.data, student.hf, student.arch.vocab)
            trainer = train.Trainer(student, teacher, settings, config.parallel, config.dtype.value)
            if resumed:
                trainer.resume(checkpoint.open_checkpoint(out_dir))
                runtime.log(f"going on after step {trainer.step} of {out_dir}")
            parents = {"student": checkpoint.identity(student), "teacher": teacher and checkpoint.identity(teacher)}
            name = train.fingerprint(student, teacher, plain(config), data.data_hash(prefixes))
            checkpoint.describe(out_dir, student.arch, name, parents, student.hf, ancestry=student.lineage)
            batches = data.train_batches(prefixes, weights, **trainer.data_position(config.data))
            figures = train.train(trainer, batches, out_dir)
            if runtime.rank() == 0 and figures:
                report.plot_losses({"student": out_dir / "metrics.jsonl"}, out_dir / "losses.png")
                report.table(
                    "distilled", train.summary(figures), [f"checkpoint: {out_dir}", f"curve: {out_dir}/losses.png"]
                )


if __name__ == "__main__":
    main()
