"""Teacher correction: train the unpruned model on the distillation text (arXiv 2408.11796).

minitron correct --nproc 8 +recipe=llama31_minitron_4b_width parallel=tp2_sp data.train=[text.jsonl]
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.settings import DistillConfig
from minitron_mcore.config.stages import CorrectRun


@entry("correct")
def main(config: CorrectRun) -> None:
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill import run
    from minitron_mcore.estimate import announce
    from minitron_mcore.evaluation import heldout
    from minitron_mcore.parallel import process_groups

    settings = DistillConfig(**vars(config.correct), kd_weight=0.0, lm_weight=1.0)
    with process_groups.stage_context(config, settings.sequence_length):
        source = run_folder.open_checkpoint(config.source, wanted=config.model.architecture)
        run.check_run(config, settings, [source], teacher=None)
        announce.print_memory(config, settings, [source], teacher=None)
        text = heldout.HeldOut(config, source) if settings.eval_every else None
        run.train([config], settings, [source], None, text)


if __name__ == "__main__":
    main()
