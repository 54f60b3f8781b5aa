"""Measure the damage of removing blocks, at every position, and choose the blocks to drop.

The metrics are loss, KL and MSE of the logits, and accuracy. The same command resumes. `study=` gives the choice to the plan.

minitron depth --nproc 3 +model=smollm2_135m parallel=tp3 depth=small data.heldout=[text.jsonl] depth.choices=winogrande.jsonl
minitron plan +model=smollm2_135m study=runs/smollm2_135m/depth prune.blocks=22
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.stages import DepthRun


@entry("depth")
def main(config: DepthRun) -> None:
    from minitron_mcore.depth import sweep
    from minitron_mcore.parallel import process_groups

    with process_groups.stage_context(config, config.depth.sequence_length):
        sweep.run(config)


if __name__ == "__main__":
    main()
