"""Small text files and tokenizers."""

import gzip
import json

import numpy as np

VOCAB = 300


WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "naïve",
    "日本語",
    "dogs",
    "😀",
    "ran",
    "far",
    ",",
    "12",
    "34",
    "mat\n",
    "\tfar",
]


def write_tokenizer(folder, bos: bool = False) -> str:
    """A byte-level BPE trained on the spot; with `bos`, one that puts BOS in front of a text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(count)]


def write_jsonl(path, rows: list[str]) -> str:
    content = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)
