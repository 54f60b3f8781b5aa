"""Search architectures within a budget, by loss after pruning and after a short distillation.

The same command resumes. Shards share the candidates: all measure, then train the best, and a last run without shards collects.

minitron search --nproc 8 +model=llama31_8b parallel=tp2_sp 'search.blocks=[28,30,32]' \\
    'search.hidden=[3072,3584]' 'search.ffn={start:8192,stop:14336,step:1024}' search.budget.parameters=5e9 \\
    data.train=[text.jsonl] data.heldout=[heldout.jsonl]
minitron search --multirun hydra/launcher=submitit_slurm search.shards=4 search.shard=0,1,2,3 ...  # one process each
STAGE=search sbatch launch/slurm/distill.sbatch search.shards=4 search.shard=0 ...                 # one node each
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.stages import SearchRun


@entry("search")
def main(config: SearchRun) -> None:
    from minitron_mcore.parallel import process_groups
    from minitron_mcore.search import runner

    with process_groups.stage_context(config, config.evaluate.sequence_length):
        runner.run(config)


if __name__ == "__main__":
    main()
