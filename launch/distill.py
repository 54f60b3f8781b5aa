"""Train a pruned student on its teacher's distribution. The same command again goes on where a stopped run ended.

torchrun --nproc-per-node 8 launch/distill.py +model=llama31_8b parallel=tp8_sp data.train=[text.jsonl]
"""

from minitron_mcore.launching import entry
from minitron_mcore.runs import DistillRun


@entry("distill")
def main(config: DistillRun) -> None:
    from minitron_mcore import checkpoint, runtime
    from minitron_mcore.distill import cache, stage

    settings = config.distill
    with runtime.distributed(config.parallel, config.seed, settings.sequence_length, patience=settings.hang_minutes):
        student = checkpoint.open_checkpoint(config.student, "student")
        teacher = cache.open_teacher(config.teacher) if settings.taught else None
        stage.run(config, settings, student, teacher)


if __name__ == "__main__":
    main()
