"""Teacher correction: train the unpruned model on the distillation's own text, so that what it teaches fits (arXiv 2408.11796).

torchrun --nproc-per-node 8 launch/correct.py +recipe=llama31_minitron_4b_width parallel=tp2_sp data.train=[text.jsonl]
"""

from minitron_mcore.config import DistillConfig
from minitron_mcore.launching import entry
from minitron_mcore.runs import CorrectRun


@entry("correct")
def main(config: CorrectRun) -> None:
    from minitron_mcore import checkpoint, runtime
    from minitron_mcore.distill import stage

    settings = DistillConfig(**vars(config.correct), kd_weight=0.0, lm_weight=1.0)
    with runtime.distributed(
        config.parallel,
        config.seed,
        settings.sequence_length,
        patience=max(settings.hang_minutes, settings.save_minutes),
        timeout_minutes=config.performance.nccl_timeout_minutes,
    ):
        source = checkpoint.open_checkpoint(config.source, wanted=config.model.architecture)
        stage.run([config], settings, [source], teacher=None)


if __name__ == "__main__":
    main()
