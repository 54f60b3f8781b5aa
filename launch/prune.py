"""Apply a plan to a sharded checkpoint; no weight moves between ranks.

torchrun --nproc-per-node 3 launch/prune.py +model=smollm2_135m parallel=tp3
"""

from minitron_mcore.launching import entry, plain
from minitron_mcore.runs import PruneRun


@entry("prune")
def main(config: PruneRun) -> None:
    from minitron_mcore import checkpoint, report, runtime
    from minitron_mcore.plan.plan import load_plan
    from minitron_mcore.prune import prune

    with runtime.distributed(config.parallel, config.seed):
        source, plan = checkpoint.open_checkpoint(config.source), load_plan(config.plan)
        with checkpoint.claimed(config.out_dir, plain(config)):
            prune(source, plan, config.out_dir, config.parallel)
        report.table("pruned", plan.summary(), [f"checkpoint: {config.out_dir}"])


if __name__ == "__main__":
    main()
