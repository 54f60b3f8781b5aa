"""Print a checkpoint's greedy continuation of a prompt.

minitron generate --nproc 3 +model=smollm2_135m parallel=tp3 "prompt='def fibonacci(n):'"
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.stages import GenerateRun


@entry("generate")
def main(config: GenerateRun) -> None:
    from pathlib import Path

    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.data import tokenizer
    from minitron_mcore.evaluation.generate import generate
    from minitron_mcore.parallel import process_groups

    with process_groups.stage_context(config):
        source = run_folder.open_checkpoint(config.source)
        words = tokenizer.open_tokenizer(config.data, source.hf, source.arch.vocab)
        prompt = words.prompt(config.prompt)
        model = run_folder.build_model(source, config.parallel, config.dtype.value)
        [new] = generate(model, source.arch, [prompt], config.tokens, lambda new: new[-1] == words.eos)
        text = words.decode(prompt + new)
        process_groups.log(text)
        if config.text_file and process_groups.rank() == 0:
            Path(config.text_file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
