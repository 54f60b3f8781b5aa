"""Run all stages of a recipe, each in its own processes; finished stages are skipped.

minitron pipeline +recipe=llama31_minitron_4b_width processes=8 parallel=tp2_sp data.train=[text.jsonl]
minitron pipeline --multirun +recipe=minitron_8b,minitron_4b processes=8 parallel=tp4_sp data.train=[text.jsonl]
minitron pipeline +recipe=minitron_8b parallel=tp8 data.train=[/data/text.jsonl] \\
    submit='sbatch --nodes 4 launch/slurm/distill.sbatch'
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.stages import PipelineRun


@entry("pipeline")
def main(config: PipelineRun) -> None:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from minitron_mcore.cli import dry_run, pipeline
    from minitron_mcore.reporting import tables

    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task)  # each stage resolves ${...} itself
    if config.dry_run:
        processes = [] if config.dry.gpus else [f"dry.gpus={config.processes}"]
        return dry_run.run(*(step.run for step in pipeline.plan(config, [*overrides, *processes])))
    steps = pipeline.plan(config, overrides)
    if config.submit:
        rows = pipeline.submit(steps, config.submit)
        return tables.table(
            f"jobs of {config.work_dir}", rows, [f"minitron status {config.work_dir} shows how far they are"]
        )
    rows, path = pipeline.run(steps, config.processes), f"{config.work_dir}/report.html"

    from minitron_mcore.export import model_card  # imports torch, which the stages' processes have left by now
    from minitron_mcore.reporting import page

    page.write(config.work_dir, path)
    model_card.update_results(config.work_dir)
    tables.table(f"finished: {config.work_dir}", rows, [f"report: {path}"])


if __name__ == "__main__":
    main()
