"""Apply a plan to a Hugging Face folder in one pass, on one process and without a checkpoint.

minitron cut +model=smollm2_135m plan=/path/to/plan.json
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.stages import CutRun
from minitron_mcore.parallel.rendezvous import is_rank_zero


@entry("cut")
def main(config: CutRun) -> None:
    from minitron_mcore.checkpoint import claim
    from minitron_mcore.export import model_card
    from minitron_mcore.pruning import apply
    from minitron_mcore.pruning.plan import load_plan
    from minitron_mcore.reporting import tables

    if not is_rank_zero():
        return
    plan, folder = load_plan(config.plan), config.model.hf
    with claim.new_run_folder(config.out_dir, resolved(config)) as new:
        apply.cut_folder(folder, plan, new, config.dtype.value)
        loaded = model_card.complete_folder(model_card.cut_origin(folder, plan, config.out_dir), new)
    tables.table(
        "cut", plan.summary(), [f"folder: {config.out_dir}, {config.dtype.value}", f"transformers loads it: {loaded}"]
    )


if __name__ == "__main__":
    main()
