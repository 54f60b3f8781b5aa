"""Choose the indices to keep from scores and target sizes; one process, no weights.

`parallel` is the layout in which the pruned model will train: sizes that it does not divide are refused.

minitron plan +model=smollm2_135m prune=smollm2_100m parallel=tp3
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.stages import PlanRun
from minitron_mcore.parallel.rendezvous import is_rank_zero


@entry("plan")
def main(config: PlanRun) -> None:
    from minitron_mcore.checkpoint import claim, disk, run_folder
    from minitron_mcore.depth import study
    from minitron_mcore.importance.scores import load_scores
    from minitron_mcore.models import architecture, sharding
    from minitron_mcore.pruning import plan as plans
    from minitron_mcore.pruning import summary, target
    from minitron_mcore.reporting import plots, tables

    if not is_rank_zero():
        return
    source = run_folder.open_checkpoint(config.source, wanted=config.model.architecture)
    scores = load_scores(config.scores, source.arch, source.fingerprint)
    prune, chosen = study.apply_study(config.study, source.arch.blocks, source.fingerprint, config.prune)
    plan = plans.make_plan(source.arch, source.fingerprint, scores, prune)
    plan.statistic.update(chosen)
    target.check_counts(plan.target, config.parameters, config.without_embeddings)
    sharding.check_shardable(plan.target, config.parallel)
    if config.prune.exportable:
        architecture.check_exportable(plan.target)
    with claim.new_run_folder(config.out_dir, resolved(config)) as folder:
        disk.replace_text(folder / plans.FILE, plan.to_json())
        plots.plot_plan(plan, scores.vectors, folder / "plan.png")
    tables.table("tensors of the plan", summary.tensors(plan, config.dtype.value))
    files = f"plan: {config.out_dir}/{plans.FILE}; picture: {config.out_dir}/plan.png"
    units = f"bytes are of {config.dtype}; a tensor is in the row of each of its axes"
    notes = [files, summary.counts(plan), units, *plan.notes()]
    tables.table("plan", summary.axes(plan, config.dtype.value), notes)


if __name__ == "__main__":
    main()
