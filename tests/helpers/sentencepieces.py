"""sentencepiece models, trained on the standard library's docs."""

import pydoc_data.topics
from pathlib import Path

from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

DOCS = [part for topic in pydoc_data.topics.topics.values() for part in topic.split("\n\n")]
TRAINED_ON = DOCS[:400]
PLAIN = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True)
LLAMA = dict(model_type="bpe", split_digits=True, allow_whitespace_only_pieces=True, **PLAIN)


def train(folder: Path, **kind) -> Path:
    """A tokenizer.model of 500 pieces in `folder`; `kind`: options of the trainer."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINED_ON), model_prefix=f"{folder}/tokenizer", vocab_size=500, minloglevel=2, **kind
    )
    return folder / "tokenizer.model"


def proto(spm: Path):
    """The content of a .model."""
    return sentencepiece_model_pb2.ModelProto.FromString(spm.read_bytes())
