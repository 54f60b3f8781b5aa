"""Answer prompts with a model, as text to train on; the same command resumes.

minitron synthesize --nproc 8 +model=llama31_8b parallel=tp2 prompts=[prompts.jsonl] \\
    synthesize.temperature=0.8 synthesize.top_p=0.95
minitron distill --nproc 8 +model=llama31_8b parallel=tp2 data.train=[runs/llama31_8b/synthesize]
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.stages import SynthesizeRun


@entry("synthesize")
def main(config: SynthesizeRun) -> None:
    from minitron_mcore.evaluation import synthesis
    from minitron_mcore.parallel import process_groups

    with process_groups.stage_context(config):
        synthesis.run(config)


if __name__ == "__main__":
    main()
