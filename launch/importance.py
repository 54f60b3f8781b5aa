"""Score hidden channels, ffn channels, heads, groups, experts and blocks on calibration text.

minitron importance --nproc 3 +model=smollm2_135m parallel=tp3 data.train=[text.jsonl]
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.stages import ImportanceRun


@entry("importance")
def main(config: ImportanceRun) -> None:
    from minitron_mcore.checkpoint import claim, run_folder
    from minitron_mcore.data import datasets, token_cache, token_files
    from minitron_mcore.errors import refuse
    from minitron_mcore.importance import checks, scores
    from minitron_mcore.importance.collector import score
    from minitron_mcore.parallel import process_groups
    from minitron_mcore.reporting import plots, tables

    settings = config.importance
    with process_groups.stage_context(config, settings.sequence_length):
        source = run_folder.open_checkpoint(config.source, wanted=config.model.architecture)
        refuse(checks.problems(source.arch, settings, process_groups.dp_group().size()))
        with claim.new_run_folder(config.out_dir, resolved(config)) as folder:
            prefixes, _ = token_cache.prepare(config.data, source.hf, source.arch.vocab)
            tokens, mask = datasets.calibration(
                prefixes,
                vocab_size=source.arch.vocab,
                sequence_length=settings.sequence_length,
                num_samples=settings.samples,
                seed=config.data.seed,
                share=token_files.split_share(config.data.split, "train"),
                whole_documents=settings.whole_documents,
            )
            model = run_folder.build_model(source, config.parallel, config.dtype.value)
            result = score(model, source, tokens, mask, settings.micro_batch, settings)
            result.metadata["data"] = datasets.data_hash(prefixes)
            with process_groups.raise_on_all_ranks(), claim.writing(folder):
                if process_groups.rank() == 0:
                    plots.plot_importance(scores.save_scores(folder, result), folder / "importance.png")
        if process_groups.rank() == 0:
            files = [f"scores: {config.out_dir}/{scores.FILE}", f"picture: {config.out_dir}/importance.png"]
            tables.table("importance", scores.summary(result), files)


if __name__ == "__main__":
    main()
