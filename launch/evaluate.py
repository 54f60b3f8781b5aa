"""Measure perplexity and bits per byte of a Hugging Face folder or sharded checkpoint.

minitron evaluate +model=smollm2_135m data.heldout=[text.jsonl]
minitron evaluate --nproc 3 +model=smollm2_135m parallel=tp3 source=runs/smollm2_135m/distill data.heldout=[text.jsonl]
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.stages import EvaluateRun


@entry("evaluate")
def main(config: EvaluateRun) -> None:
    from minitron_mcore.checkpoint import claim, disk
    from minitron_mcore.evaluation import perplexity
    from minitron_mcore.parallel import process_groups
    from minitron_mcore.reporting import tables

    with process_groups.stage_context(config, config.evaluate.sequence_length):
        model, tokenizer = perplexity.open_model(config)
        with claim.new_run_folder(config.out_dir, resolved(config)) as folder:
            rows = perplexity.evaluate_run(model, tokenizer, config)
            with process_groups.raise_on_all_ranks(), claim.writing(folder):
                if process_groups.rank() == 0:
                    disk.write_json(
                        folder / "evaluation.json",
                        {"source": config.source, "parameters": model.parameters, "files": rows},
                    )
        tables.table(f"evaluation of {config.source}", rows, [f"figures: {config.out_dir}/evaluation.json"])


if __name__ == "__main__":
    main()
