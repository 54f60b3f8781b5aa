"""Tokenise text files into Megatron's .bin/.idx pairs, in parallel processes.

minitron tokenize_text +model=llama31_8b 'files=[/data/*.jsonl.gz]' out_dir=/data/tokens processes=32
minitron distill --nproc 8 +model=llama31_8b data.train=[/data/tokens]
"""

# The file is not named tokenize.py, which would hide Python's module of that name from `python launch/STAGE.py`.
from minitron_mcore.cli.main import entry
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.stages import TokenizeTextRun
from minitron_mcore.parallel.rendezvous import is_rank_zero


@entry("tokenize_text")
def main(config: TokenizeTextRun) -> None:
    from minitron_mcore.checkpoint import claim
    from minitron_mcore.data.corpus import Corpus
    from minitron_mcore.reporting import tables

    if not is_rank_zero():
        return
    corpus = Corpus(config)
    if config.dry_run:
        return tables.table("files to tokenise", corpus.rows(), [f"{corpus.processes} processes"])
    with claim.claim_run_folder(config.out_dir, resolved(config)):
        rows = corpus.tokenize()
        claim.finish(config.out_dir)
    tables.table(
        "tokens", rows, ["seconds: of all processes together", f"train on them: data.train=[{config.out_dir}]"]
    )


if __name__ == "__main__":
    main()
