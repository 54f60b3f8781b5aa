"""A tiny model and its text as launch files read them, and options with which every stage takes seconds."""

import json
from pathlib import Path

from tests.helpers import models
from tests.helpers.launching import word_tokenizer, words

NAMED = ["+model=smollm2_135m", "model.name=tiny", "model.architecture=null", "dtype=fp32"]
MODEL = [*NAMED, "model.hf=hf"]
STAGES = [
    *MODEL,
    *("data.train=[text.txt]", "data.heldout=[text.txt]", "importance.sequence_length=16"),
    *("evaluate.sequence_length=32", "depth.sequence_length=32", "depth.sizes=[1]"),
    *("search.ffn=[18,24]", "search.best=1", "search.eval_every=1"),
    *("search.budget.parameters=70000", "search.budget.tolerance=0.9"),
]
SYNTHESIZE = [
    "prompts=[prompts.jsonl]",
    "synthesize.tokens=3",
    "synthesize.prompt_tokens=8",
    "synthesize.micro_batch=2",
]


def write(root: Path, seed: int = 0, count: int = 400) -> None:
    """The folder hf, text.txt of some words, and prompts.jsonl."""
    models.tiny_llama(root / "hf")
    word_tokenizer(root / "hf")
    (root / "text.txt").write_text(words(count, seed))
    prompts = [json.dumps({"prompt": words(4, number)}) for number in range(6)]
    (root / "prompts.jsonl").write_text("\n".join(prompts))


def training(**sizes) -> list[str]:
    """Settings of `correct` and `distill`."""
    sizes = dict(global_batch=2, sequence_length=16, warmup_steps=0) | sizes
    return [f"{section}.{key}={value}" for section in ("correct", "distill") for key, value in sizes.items()]
