"""Hugging Face folder + plan -> pruned Hugging Face folder, in one pass on one process and without a checkpoint.

python launch/cut.py +model=smollm2_135m plan=/path/to/plan.json
"""

from minitron_mcore.launching import alone, entry, plain
from minitron_mcore.runs import CutRun


@entry("cut")
def main(config: CutRun) -> None:
    from minitron_mcore import checkpoint, delivery, prune, report
    from minitron_mcore.plan.plan import load_plan

    if not alone():
        return
    plan, folder = load_plan(config.plan), config.model.hf
    with checkpoint.claimed(config.out_dir, plain(config)):
        prune.cut_folder(folder, plan, config.out_dir, config.dtype.value)
        taken = delivery.deliver(delivery.cut(folder, plan, config.out_dir), config.out_dir)
    report.table("loaders (every block has the same sizes)", taken)
    report.table("cut", plan.summary(), [f"folder: {config.out_dir}, {config.dtype.value}"])


if __name__ == "__main__":
    main()
