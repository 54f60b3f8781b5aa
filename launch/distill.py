"""Train a pruned student on its teacher's distribution. The same command again goes on where a stopped run ended.

torchrun --nproc-per-node 8 launch/distill.py +model=llama31_8b parallel=cp2 data.train=[text.jsonl]
torchrun --nproc-per-node 8 launch/distill.py +model=llama31_8b parallel=cp2 data.train=[text.jsonl] \\
    'students={width: runs/a/prune, depth: runs/b/prune}'
"""

import dataclasses

from minitron_mcore.launching import entry
from minitron_mcore.runs import DistillRun


@entry("distill")
def main(config: DistillRun) -> None:
    from minitron_mcore import checkpoint, runtime
    from minitron_mcore.distill import apart, cache, stage

    settings = config.distill
    runs = [
        dataclasses.replace(config, student=student, students=None, out_dir=f"{config.out_dir}/{name}")
        for name, student in (config.students or {}).items()
    ]
    with runtime.distributed(
        config.parallel,
        config.seed,
        settings.sequence_length,
        patience=max(settings.hang_minutes, settings.save_minutes),
        timeout_minutes=config.performance.nccl_timeout_minutes,
        apart=settings.teacher_ranks,
        other=settings.teacher_parallel,
    ):
        if (bridge := runtime.bridge()) and bridge.beyond:
            teacher = checkpoint.open_checkpoint(config.teacher, "teacher")
            return apart.serve(teacher, settings, config.parallel, config.dtype.value, config.performance)
        runs = runs or [config]
        students = [checkpoint.open_checkpoint(run.student, "student") for run in runs]
        teacher = cache.open_teacher(config.teacher) if settings.taught else None
        stage.run(runs, settings, students, teacher)


if __name__ == "__main__":
    main()
