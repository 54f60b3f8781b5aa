"""Apply a plan to a sharded checkpoint; no weight moves between ranks.

minitron prune --nproc 3 +model=smollm2_135m parallel=tp3
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.stages import PruneRun


@entry("prune")
def main(config: PruneRun) -> None:
    from minitron_mcore.checkpoint import claim, run_folder
    from minitron_mcore.parallel import process_groups
    from minitron_mcore.pruning.apply import prune
    from minitron_mcore.pruning.plan import load_plan
    from minitron_mcore.reporting import tables

    with process_groups.stage_context(config):
        source, plan = run_folder.open_checkpoint(config.source), load_plan(config.plan)
        with claim.new_run_folder(config.out_dir, resolved(config)) as folder:
            prune(source, plan, folder, config.parallel)
        tables.table("pruned", plan.summary(), [f"checkpoint: {config.out_dir}"])


if __name__ == "__main__":
    main()
