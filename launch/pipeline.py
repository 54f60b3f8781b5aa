"""Every stage of a recipe, each in processes of its own; finished ones are kept, so the same command goes on where it stopped.

python launch/pipeline.py +recipe=llama31_minitron_4b_width processes=8 parallel=tp2_sp data.train=[text.jsonl]
python launch/pipeline.py --multirun +recipe=minitron_8b,minitron_4b processes=8 parallel=tp4_sp data.train=[text.jsonl]
"""

from minitron_mcore.launching import entry
from minitron_mcore.runs import PipelineRun


@entry("pipeline")
def main(config: PipelineRun) -> None:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from minitron_mcore import dryrun, pipeline, report
    from minitron_mcore.page import write

    typed = OmegaConf.to_container(HydraConfig.get().overrides.task)  # the stages resolve ${...} themselves
    overrides = [override for override in typed if not override.startswith(("processes=", "stages="))]
    if config.dry_run:
        processes = [] if config.dry.gpus else [f"dry.gpus={config.processes}"]
        return dryrun.run(*pipeline.plan(config, [*overrides, *processes])[1].values())
    rows, page = pipeline.run(config, overrides), f"{config.work_dir}/report.html"
    write.write(config.work_dir, page)
    report.table(f"finished: {config.work_dir}", rows, [f"report: {page}"])


if __name__ == "__main__":
    main()
