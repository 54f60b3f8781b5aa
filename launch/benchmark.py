"""Run the papers' nine benchmarks with lm-eval, beside the published rows; the same command resumes.

A model is a Hugging Face folder, on one process, or a sharded checkpoint in any layout.

minitron benchmark +recipe=llama31_minitron_4b_width benchmark.data_dir=/data/eval benchmark.run_code=true
minitron benchmark --nproc 3 +model=smollm2_135m parallel=tp3 source=runs/smollm2_135m/distill benchmark.data_dir=/data/eval \\
    benchmark.tasks=[winogrande,gsm8k] benchmark.limit=50
minitron benchmark work_dir=runs/mine 'models={teacher: a/hf, pruned: b/hf, distilled: c/hf}' benchmark.data_dir=/data/eval
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.stages import BenchmarkRun


@entry("benchmark")
def main(config: BenchmarkRun) -> None:
    from minitron_mcore.evaluation.benchmarks import run
    from minitron_mcore.parallel import process_groups

    with process_groups.stage_context(config):
        run.run(config)


if __name__ == "__main__":
    main()
