"""What a checkpoint says: its likeliest continuation of a prompt.

torchrun --nproc-per-node 3 launch/generate.py +model=smollm2_135m parallel=tp3 prompt='def fibonacci(n):'
"""

from minitron_mcore.launching import entry
from minitron_mcore.runs import GenerateRun


@entry("generate")
def main(config: GenerateRun) -> None:
    import torch

    from minitron_mcore import checkpoint, runtime, tokenizer
    from minitron_mcore.generate import generate

    with runtime.distributed(config.parallel, config.seed):
        source = checkpoint.open_checkpoint(config.source)
        words = tokenizer.open_tokenizer(config.data, source.hf, source.arch.vocab)
        model = checkpoint.build_model(source, config.parallel, config.dtype.value)
        prompt = torch.tensor([words.documents([config.prompt])[0][:-1]])  # without the EOS that ends a document
        runtime.log(words.decode(generate(model, source.arch, prompt, config.tokens, words.eos)[0].tolist()))


if __name__ == "__main__":
    main()
