"""Study which blocks a model can spare: loss, KL and MSE of the logits and accuracy without runs of 1, 2, 4, 8 and half of them at
every position, and a choice for each number. The same command goes on where it was stopped; `study=` hands the choice to plan.

torchrun --nproc-per-node 3 launch/depth.py +model=smollm2_135m parallel=tp3 depth=small data.heldout=[text.jsonl] \\
    depth.choices=winogrande.jsonl
python launch/plan.py +model=smollm2_135m study=runs/smollm2_135m/depth prune.blocks=22
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.stages import DepthRun


@entry("depth")
def main(config: DepthRun) -> None:
    from minitron_mcore.depth import sweep
    from minitron_mcore.parallel import process_groups

    with process_groups.distributed_context(config.parallel, config.seed, config.depth.sequence_length):
        sweep.run(config)


if __name__ == "__main__":
    main()
