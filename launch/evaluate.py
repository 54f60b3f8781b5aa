"""Perplexity and bits per byte on text, of a Hugging Face folder (plain transformers) or of a sharded checkpoint.

python launch/evaluate.py +model=smollm2_135m data.heldout=[text.jsonl]
torchrun --nproc-per-node 3 launch/evaluate.py +model=smollm2_135m parallel=tp3 \\
    source=runs/smollm2_135m/distill data.heldout=[x.jsonl]
"""

from minitron_mcore.launching import entry, plain
from minitron_mcore.runs import EvaluateRun


@entry("evaluate")
def main(config: EvaluateRun) -> None:
    from pathlib import Path

    from minitron_mcore import checkpoint, evaluate, report, runtime

    with runtime.distributed(config.parallel, config.seed, config.evaluate.sequence_length):
        model, tokenizer = evaluate.open_model(config)
        with checkpoint.claimed(config.out_dir, plain(config)):
            rows = evaluate.evaluate_run(model, tokenizer, config)
            if runtime.rank() == 0:
                report.write_json(
                    Path(config.out_dir) / "evaluation.json",
                    {"source": config.source, "parameters": model.parameters, "files": rows},
                )
        report.table(f"evaluation of {config.source}", rows, [f"figures: {config.out_dir}/evaluation.json"])


if __name__ == "__main__":
    main()
