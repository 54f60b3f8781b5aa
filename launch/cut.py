"""Hugging Face folder + plan -> pruned Hugging Face folder, in one pass on one process and without a checkpoint.

python launch/cut.py +model=smollm2_135m plan=/path/to/plan.json
"""

from minitron_mcore.config import CutRun
from minitron_mcore.launching import alone, entry, plain


@entry("cut")
def main(config: CutRun) -> None:
    from minitron_mcore import checkpoint, report
    from minitron_mcore.plan.plan import load_plan
    from minitron_mcore.prune import cut_folder

    if not alone():
        return
    plan = load_plan(config.plan)
    with checkpoint.claimed(config.out_dir, plain(config)):
        cut_folder(config.model.hf, plan, config.out_dir, config.dtype.value)
    report.table("cut", plan.summary(), [f"folder: {config.out_dir}, {config.dtype.value}"])


if __name__ == "__main__":
    main()
