"""Score hidden channels, ffn channels, heads and blocks by forward passes over calibration text.

torchrun --nproc-per-node 3 launch/importance.py +model=smollm2_135m parallel=tp3 data.train=[text.jsonl]
"""

from minitron_mcore.launching import entry, plain
from minitron_mcore.runs import ImportanceRun


@entry("importance")
def main(config: ImportanceRun) -> None:
    from minitron_mcore import checkpoint, data, pictures, report, runtime
    from minitron_mcore.errors import refuse
    from minitron_mcore.importance import checks, scores
    from minitron_mcore.importance.collect import score

    settings = config.importance
    with runtime.distributed(config.parallel, config.seed, settings.sequence_length):
        source = checkpoint.open_checkpoint(config.source, wanted=config.model.architecture)
        refuse(checks.problems(source.arch, settings, runtime.dp_group().size()))
        with checkpoint.claimed(config.out_dir, plain(config)):
            prefixes, _ = data.prepare(config.data, source.hf, source.arch.vocab)
            tokens, mask = data.calibration(
                prefixes,
                vocab_size=source.arch.vocab,
                sequence_length=settings.sequence_length,
                num_samples=settings.samples,
                seed=config.data.seed,
                whole_documents=settings.whole_documents,
            )
            model = checkpoint.build_model(source, config.parallel, config.dtype.value)
            found = score(model, source, tokens, mask, settings.micro_batch, settings)
            found.metadata["data"] = data.data_hash(prefixes)
            if runtime.rank() == 0:
                file = scores.save_scores(config.out_dir, found)
                pictures.plot_importance(file, f"{config.out_dir}/importance.png")
                report.table(
                    "importance",
                    scores.summary(found),
                    [f"scores: {file}", f"picture: {config.out_dir}/importance.png"],
                )


if __name__ == "__main__":
    main()
